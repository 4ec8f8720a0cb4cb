"""Sweeps: tables of runs, the jobs that fill them, and how their results are shown."""
