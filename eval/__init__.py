"""Evaluate responses: benchmarks, generation, graders and the sandbox for programs.

Knows nothing of recipes or of training.
"""
