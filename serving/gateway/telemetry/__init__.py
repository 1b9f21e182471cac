"""Spans and metrics: what a request cost, how long it took and how it ended. Never what it said,
unless ``telemetry.content`` asks for it."""
