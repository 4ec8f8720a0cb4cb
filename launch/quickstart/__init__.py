"""The embedded default: a small base pretrained on the spot, and a task for it."""
