"""Astra: low-rank adapters that start from eigenvectors of a module's output second moment.

This package is the method alone (arXiv 2602.19111), on torch, torch.distributed and PEFT's LoRA
layers. It knows nothing of recipes, engines, datasets or run folders. Callers pass in an object
that reads and writes weights that may be sharded (`astra.weights.Weights`).

Where to start: calibrate (the distributed calibration, and the words used everywhere), eigen (which
eigenvectors), inits (initial factors), adapter (the factors in PEFT's layers and files).
"""
