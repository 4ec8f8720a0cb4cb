"""Record where a function would wait for a GPU, or for the other ranks' Python objects.

Every way in which Python reads a tensor's values makes the host wait for a GPU that holds them.
There is none here: the methods are spied on, and whether the tensor would be on a GPU is left to
the reader of the record.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
COLLECTIVES = ("barrier", "all_gather_object", "broadcast_object_list", "gather_object")


@contextmanager
def record_waits() -> Iterator[Counter[str]]:
    """Within the context, count `name file:function` of every read and every such collective.

    The place is the function that calls.
    """
    seen: Counter[str] = Counter()

    def spy(name: str, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            frame = sys._getframe(1)
            seen[f"{name} {Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
            return function(*arguments, **options)

        return call

    with ExitStack() as patches:
        for holder, names in ((torch.Tensor, READS), (dist, COLLECTIVES)):
            for name in names:
                own = getattr(holder, name)
                patches.enter_context(mock.patch.object(holder, name, spy(name, own)))
        yield seen
