"""Run thousands of Gloo gathers at once on two ranks.

Proves that each group works in one thread, and that the heap stays whole. About 20 s.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import WORKERS


def test_many_gathers_at_once(launch: Callable, tmp_path: Path) -> None:
    launch(WORKERS / "gloo.py", tmp_path / "threads.json", ranks=2)
    assert json.loads((tmp_path / "threads.json").read_text()) == [1, 1]
