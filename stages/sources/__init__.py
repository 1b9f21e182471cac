"""Where documents come from, and how bytes become text: one module a kind of source."""
