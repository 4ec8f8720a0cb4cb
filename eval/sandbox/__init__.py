"""Run programs that a model wrote, isolated from this machine and from their tests."""
