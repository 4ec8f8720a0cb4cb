"""Gloo's groups work in one thread each, and gathers in any number at once leave the heap whole."""

import json
from collections.abc import Callable
from pathlib import Path


def test_many_gathers_at_once(launch: Callable, tmp_path: Path) -> None:
    launch("tests/distributed/workers/gloo.py", tmp_path / "threads.json", ranks=2)
    assert json.loads((tmp_path / "threads.json").read_text()) == [1, 1]
