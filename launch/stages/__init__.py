"""The stages of a run, one module each; launch.pipeline calls them from top to bottom."""
