"""The OpenAI-compatible service: retrieval, prompt, engine and citations of one release."""
