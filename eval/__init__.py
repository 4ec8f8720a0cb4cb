"""The evaluation protocol: benchmarks, graders and generation. Knows nothing of recipes or of training."""
