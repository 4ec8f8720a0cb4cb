"""`engine: auto` is decided once from the rank with least memory, and taken again at a resume.

Real launches of two ranks; simulated is the memory that is free (workers/auto.py). 20 s.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cases import NO_SCORES
from tests.support.paths import WORKERS
from tests.support.processes import make_set_options
from tests.support.runs import copy_unfinished, read_facts, read_results, runs_are_equal


@pytest.mark.full
def test_the_engine_is_chosen_for_the_least_memory_and_stays(
    launch: Callable, recipe: Path, tmp_path: Path
) -> None:
    fields = ["adapter.method=lora", "train.max_steps=4", "train.checkpoint_every=2", NO_SCORES]
    line = ["--recipe", recipe, *make_set_options(fields), "--engine", "auto", "--output"]
    begun, resumed = tmp_path / "begun", tmp_path / "resumed"
    done = launch(WORKERS / "auto.py", "1e10,1", *line, begun, ranks=2)
    assert "engine: auto is fsdp, which takes least, as none fits: " in done.stdout
    assert "train.gradient_checkpointing: auto is false on CPUs" in done.stdout
    decided = {"engine": "fsdp", "train.gradient_checkpointing": False}
    assert read_results(begun)["decided"] == read_facts(begun)["decided"] == decided
    assert read_results(begun)["engine"] == "fsdp"

    copy_unfinished(begun, resumed, 2)
    # Here zero2 would fit.
    done = launch(WORKERS / "auto.py", "1e10,1e10", *line, resumed, ranks=2)
    assert "engine: auto stays fsdp, as this run was begun with" in done.stdout
    assert read_results(resumed)["decided"] == decided
    assert runs_are_equal(begun, resumed)
