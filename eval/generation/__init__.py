"""Generate a model's responses, with transformers or with a server."""
