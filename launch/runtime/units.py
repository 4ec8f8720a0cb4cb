"""Units that several rooms convert by."""

GIB = 2**30  # bytes
