"""Guards: what may come in and what may go out. docs/guards.md says which and how well."""
