"""The plan's bytes of communication are those of the collectives that the engines really call.

One launch of two ranks trains three steps on each engine (workers/communication.py). Half a minute.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.planning.communication import count_communication
from tests.support.paths import WORKERS


@pytest.mark.full
def test_planned_bytes_are_those_of_the_collectives(
    launch: Callable, recipe: Path, tmp_path: Path
) -> None:
    launch(WORKERS / "communication.py", recipe, tmp_path, ranks=2)
    found = json.loads((tmp_path / "bytes.json").read_text())
    for engine, step in found.items():
        # A model of more elements than ZeRO-3 keeps gathered.
        num_elements = 10**12 if engine.endswith("large") else step["base"] // 2
        sizes = (step["base"], step["trained"])
        planned = count_communication(engine.split(",")[0], num_elements, *sizes, False)
        count = step["micro_batches"]
        assert count > 1
        # Shards are padded; and what is not large is not counted by the spy. ZeRO-3 that keeps
        # nothing gathers the head, which is tied to the embedding, once more.
        tolerance = 0.15 if engine.endswith("large") else 0.02
        for kind in ("gathered", "scattered", "reduced"):
            expected = count * getattr(planned, kind)
            expected += planned.step_gathered if kind == "gathered" else 0
            assert step.get(kind, 0) == pytest.approx(expected, rel=tolerance), (engine, kind)
