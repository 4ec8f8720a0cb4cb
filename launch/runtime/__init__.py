"""Processes, errors, files and locks: what every command builds on."""
