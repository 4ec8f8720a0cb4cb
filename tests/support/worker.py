"""Helpers of the scripts in tests/distributed/workers, which run as ranks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure


def read_arguments() -> list[str]:
    """Return the command line's arguments without --local_rank, which deepspeed adds."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]


def skip_plots() -> None:
    """Draw plots but do not write them, which takes half of a small run's time."""
    Figure.savefig = lambda *_, **__: None


@contextmanager
def keeping_logits(folder: Path, ids: list[list[int]]) -> Iterator[None]:
    """Within the context, runs write the trained model's logits on `ids` in the place of scores."""

    from launch import pipeline  # most workers need none of it
    from launch.runtime.distributed import run_on_rank0

    def keep_logits(_run: object, loaded: Any, *_: object) -> dict:
        with torch.no_grad():
            logits = loaded.model.eval()(input_ids=torch.tensor(ids)).logits
        run_on_rank0(lambda: torch.save(logits, folder / "logits.pt"))
        return {}

    with mock.patch.object(pipeline, "score_run", keep_logits):
        yield
