"""A language model as judge: asked over HTTP, believed only as far as people agree with it."""
