"""Adapter methods: what each needs of a calibration, and the initial factors it gives.

A new method is one file here that defines `METHOD`, and one line in `registry.py`. These files are
read for `--help` too, so they import torch only inside their functions.
"""
