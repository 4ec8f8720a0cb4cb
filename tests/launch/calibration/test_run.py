"""What a calibration leaves: no base in memory.

In one process; about 5 s.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from launch.calibration import effective_rank, run
from launch.calibration.run import calibrate_base
from launch.config.loading import validate_recipe
from launch.config.schema import Recipe
from launch.runtime.distributed import start_process_group, stop_process_group

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    start_process_group()
    yield
    stop_process_group()


def make_recipe(**adapter: object) -> Recipe:
    return validate_recipe(
        {
            "model": {"name": "m"},
            "data": {"path": "d"},
            "adapter": {"rank": 4} | adapter,
            "calibration": {"samples": 2},
            "engine": "single",
        }
    )


def load_in_a_cycle(models: list[weakref.ref], engine: SimpleNamespace) -> tuple[nn.Module, dict]:
    """Return a model that refers to itself, as sharded ones do, and that its engine holds."""
    base = nn.Linear(2, 2)
    base.hook = lambda: base
    engine.base = base
    models.append(weakref.ref(base))
    return base, {}


@pytest.mark.parametrize("command", ["calibrate", "after"])
def test_the_base_is_freed_before_the_next_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref] = []
    alive: list[int] = []
    for module in (run, effective_rank):
        monkeypatch.setattr(
            module,
            "make_engine",
            lambda *_: SimpleNamespace(inference_mode=lambda _: nullcontext()),
        )
        monkeypatch.setattr(
            module, "load_base", lambda _recipe, _model, engine: load_in_a_cycle(models, engine)
        )
        monkeypatch.setattr(
            module,
            "make_calibration",
            lambda *_: alive.append(sum(model() is not None for model in models)),
        )
    for name in ("_find_export", "_check_inputs", "_write_comparison", "check_model"):
        monkeypatch.setattr(effective_rank, name, lambda *_, **__: Path("model"))
    inputs = SimpleNamespace(model=None, head=None, dtype=torch.float32)
    gc.disable()
    try:
        if command == "calibrate":
            calibrate_base(make_recipe(), inputs, CPU, tmp_path)
            assert alive == [1]
        else:
            effective_rank.measure_effective_ranks(tmp_path, make_recipe(), inputs, CPU)
            assert alive == [1, 1]
        assert [model() for model in models] == [None] * len(models)
    finally:
        gc.enable()
