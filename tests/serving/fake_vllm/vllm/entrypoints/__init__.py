"""Stands in for vLLM in tests of what starts and ends engines. See entrypoints/cli/main.py."""
