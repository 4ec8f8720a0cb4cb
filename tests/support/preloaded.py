"""Import what ranks import, early or late, in the process that is forked for them (forked.py)."""

import gc
from importlib import import_module

for name in (
    "launch.calibrate",
    "launch.engines.fsdp",
    "launch.engines.zero",
    "launch.evaluate",
    "launch.train",
    "deepspeed.runtime.zero.muon.original_muon",  # imports torch's compiler, which takes 4 s
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
):
    import_module(name)
gc.freeze()  # collections in a fork skip all this
