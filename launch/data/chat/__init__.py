"""Rows with messages: read, rendered by a chat template, and tokenised with a mask of the answers."""
