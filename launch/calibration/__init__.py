"""Distributed calibration of a recipe: its batches, its folder on disk, and what it shows."""
