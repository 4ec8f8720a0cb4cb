"""Generation on three sharded ranks: the responses of one process, in as many forward passes on each rank."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.distributed.workers.generation import NUMBERS, prompts
from tests.eval.generation.test_schedule import greedy, make_model, make_tokenizer, other_models


def test_sharded_ranks_take_the_same_steps(launch: Callable, tmp_path: Path) -> None:
    """Else shards would wait for ever; here every rank holds the whole model, so a wrong count shows."""
    launch("tests/distributed/workers/generation.py", tmp_path / "found.json", ranks=3)
    found = iter(json.loads((tmp_path / "found.json").read_text()))
    tokenizer = make_tokenizer()
    for model in (make_model(), other_models()["convolutions"].eval()):
        for n in NUMBERS:
            texts, passes = zip(*next(found), strict=True)
            assert passes[0] > 1
            assert len(set(passes)) == 1
            assert texts == ([tokenizer.decode(greedy(model, ids, 19)) for ids in prompts(n)],) * 3
