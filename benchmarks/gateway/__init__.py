"""The gateway against a bare relay and LiteLLM; see ``__main__.py``."""
