"""From a recipe's rows to token batches."""
