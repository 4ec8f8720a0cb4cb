"""Responses of a model: by transformers, or by a server."""
