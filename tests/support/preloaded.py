"""What ranks import, early or late, for the process whose forks they are (forked.py)."""

import gc
from importlib import import_module

for name in (
    "launch.calibrate",
    "launch.engines.fsdp",
    "launch.engines.zero",
    "launch.evaluate",
    "launch.train",
    "deepspeed.runtime.zero.muon.original_muon",  # with torch's compiler: 4 s
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
):
    import_module(name)
gc.freeze()  # a collection in a fork need not pass over all this
