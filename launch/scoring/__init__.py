"""Scores of a model: benchmarks, and the loss on rows kept apart."""
