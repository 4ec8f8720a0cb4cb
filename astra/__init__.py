"""Astra: low-rank adapters initialised from eigenvectors of a layer's output second moment.

Knows torch, PEFT's layers and torch.distributed. Knows nothing of recipes, engines, datasets or run folders: sharded
weights are reached through the two functions of `astra.weights.Weights`, which the caller passes in.
"""
