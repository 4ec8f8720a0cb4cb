"""Generate on three ranks as if they were sharded.

Proves that the responses are those of one process, and that every rank makes as many forward
passes: else ranks that hold shards would wait for each other for ever. Here every rank holds the
whole model, so that a wrong count shows. About 5 s.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tests.support.cases import NEW_TOKENS, PROMPT_COUNTS, make_prompts
from tests.support.generation import (
    decode_greedily,
    make_model,
    make_other_models,
    make_tokenizer,
)
from tests.support.paths import WORKERS


def test_sharded_ranks_make_the_same_forward_passes(launch: Callable, tmp_path: Path) -> None:
    launch(WORKERS / "generation.py", tmp_path / "found.json", ranks=3)
    found = iter(json.loads((tmp_path / "found.json").read_text()))
    tokenizer = make_tokenizer()
    for model in (make_model(), make_other_models()["convolutions"].eval()):
        for count in PROMPT_COUNTS:
            texts, num_passes = zip(*next(found), strict=True)
            assert num_passes[0] > 1
            assert len(set(num_passes)) == 1
            greedy = [decode_greedily(model, ids, NEW_TOKENS) for ids in make_prompts(count)]
            assert texts == ([tokenizer.decode(ids) for ids in greedy],) * 3
