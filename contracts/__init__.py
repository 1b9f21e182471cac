"""What crosses the doors: records, parameters, settings, errors. Imports nothing of ours."""
