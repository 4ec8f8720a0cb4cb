"""Rows of tasks with a head: their texts and labels, and the tokens of those."""
