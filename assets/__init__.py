"""WHAT: every artifact as a Dagster asset; the stages' ones are generated from dvc.yaml.

This module's tree imports only dagster, yaml and the standard library at its top, because every
process that loads the definitions pays for it (4.6 s against 44.7 s with the whole stack).
"""
