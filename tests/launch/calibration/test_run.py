"""What a calibration leaves: no base in memory, all of its seconds, and ranks that follow from it.

A tiny random Llama in one process; about 5 s.
"""

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from launch.calibration import effective_rank, run
from launch.calibration.run import allocate_lora_ranks, calibrate_base, make_calibration
from launch.calibration.store import MANIFEST, SPECTRUM, save_window
from launch.config.loading import validate_recipe
from launch.config.schema import Recipe
from launch.data.token_set import make_text_set
from launch.engines import make_engine
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.units import GIB

CPU = torch.device("cpu")
TARGETS = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


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
            "calibration": {"samples": 2, "memory_gib": 25_000 / GIB},  # for one layer of two
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


def test_a_calibration_took_the_seconds_of_all_its_starts(
    make_llama: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: the clock. A window takes 10 s."""
    model, clock, saved = make_llama(), SimpleNamespace(now=5.0), []
    linears = {name: model.get_submodule(name) for name in TARGETS}
    tokens = make_text_set([list(range(2, 12)), list(range(20, 29))])
    calibration = SimpleNamespace(tokens=tokens, data={})
    inputs = SimpleNamespace(calibration=calibration, data={}, base={}, dtype=torch.float32)
    calibrate_modules = run.calibrate_modules

    def calibrate_slowly(*arguments: object, **options: object) -> Iterator[dict]:
        for solutions in calibrate_modules(*arguments, **options):
            clock.now += 10
            yield solutions

    def save_one(*arguments: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save_window(*arguments))

    monkeypatch.setattr(run.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(run, "calibrate_modules", calibrate_slowly)
    monkeypatch.setattr(run, "save_window", save_one)
    engine = make_engine("single", CPU, torch.float32)
    arguments = (make_recipe(targets=TARGETS), inputs, engine, model, linears, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make_calibration(*arguments)
    clock.now += 1000
    saved.clear()
    make_calibration(*arguments)
    assert len(list(tmp_path.glob("window-*"))) == 2
    # The second window of the first start is lost.
    assert json.loads((tmp_path / MANIFEST).read_text())["seconds"] == 20


@pytest.mark.parametrize("kept", [256, 512])
def test_ranks_by_effective_rank_do_not_depend_on_how_much_a_calibration_kept(
    kept: int, tmp_path: Path
) -> None:
    modules = {name: {"effective_rank": 1.0, "rank": kept} for name in "abcde"}
    modules["a"]["effective_rank"] = 1e12
    (tmp_path / SPECTRUM).write_text(json.dumps({"modules": modules}))
    recipe = make_recipe(rank=128, rank_allocation="effective_rank")
    # 5 x 128 in all, at most max(2 x 128, 256) of them for one module.
    assert allocate_lora_ranks(recipe, tmp_path) == {"a": 256} | dict.fromkeys("bcde", 96)
