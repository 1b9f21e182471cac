"""WITH WHAT: clients of everything outside a stage. Only ``dagster_*`` modules import dagster."""
