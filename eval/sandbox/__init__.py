"""Runs programs that a model wrote against a benchmark's tests, in a box that they cannot leave."""
