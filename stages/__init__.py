"""HOW: one module a stage, run as ``python -m stages.<name>``; never imports dagster."""
