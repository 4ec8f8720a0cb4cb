"""A base model: its files, found and checked before anything is computed."""
