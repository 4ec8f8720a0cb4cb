"""What is measured beside the benchmarks, in the launches of test_train.py: alike on every engine and rank."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from tests.distributed.test_train import LAUNCHES, load_base, run_of

pytestmark = pytest.mark.xdist_group("train")


def by_hand(model: PreTrainedModel, base: Path, texts: list[str]) -> tuple[float, float]:
    """Loss per token and next-token accuracy, one text at a time."""
    tokenizer, losses, hits = AutoTokenizer.from_pretrained(base), [], []
    for text in texts:
        ids = torch.tensor(tokenizer(text).input_ids)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None]).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        hits.append(logits.argmax(-1) == ids[1:])
    return torch.cat(losses).mean().item(), torch.cat(hits).double().mean().item()


def test_other_text_is_predicted_alike_by_all_launches_and_by_plain_pytorch(
    trained: Callable[..., Path], base: Path, data: Path
) -> None:
    results = [
        json.loads((run_of(trained, case) / "results.json").read_text()) for case in LAUNCHES
    ]
    texts = [json.loads(line)["text"] for line in (data / "other.jsonl").read_text().splitlines()]
    models = {
        "before": load_base(base),
        "after": PeftModel.from_pretrained(load_base(base), run_of(trained, LAUNCHES[1]) / "lora"),
    }
    for when, model in models.items():
        loss, accuracy = by_hand(model, base, texts)
        for result in results:
            assert result["other_text"][when]["loss"] == pytest.approx(loss, rel=1e-4)
            assert result["other_text"][when]["accuracy"] == pytest.approx(
                accuracy, abs=2 / 380
            )  # two near ties
    assert results[0]["other_text"]["after"]["loss"] != pytest.approx(
        results[0]["other_text"]["before"]["loss"], rel=0.01
    )


def test_parameters_and_memory_are_counted_on_every_rank(trained: Callable[..., Path]) -> None:
    for case in LAUNCHES:
        result = json.loads((run_of(trained, case) / "results.json").read_text())
        # Rank 4 on two layers of 32 and 80 wide with two of four heads of keys and values.
        per_layer = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 80))
        assert result["trained_parameters"] == 2 * per_layer
        assert len(result["peak_memory"]) == case[0]
        assert all(2**26 < size < 2**34 for size in result["peak_memory"])
