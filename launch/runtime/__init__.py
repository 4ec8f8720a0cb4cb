"""Processes, errors and files: what every command stands on."""
