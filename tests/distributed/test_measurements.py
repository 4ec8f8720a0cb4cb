"""Compare what a run measures beside its benchmarks with plain PyTorch, on every engine and rank.

Proves that the loss on other text, the parameter count and the memory are right. Shares the
launches of test_train.py, so that it takes a few seconds after it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from tests.support.cases import LAUNCHES, ZERO3_1, ZERO3_2, LaunchCase, make_params, train_case
from tests.support.plain import load_base
from tests.support.runs import read_results

pytestmark = pytest.mark.xdist_group("train")


def measure_text(model: PreTrainedModel, base: Path, texts: list[str]) -> tuple[float, float]:
    """Return loss per token and next-token accuracy, computed one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses, hits = [], []
    for text in texts:
        ids = torch.tensor(tokenizer(text).input_ids)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None]).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        hits.append(logits.argmax(-1) == ids[1:])
    return torch.cat(losses).mean().item(), torch.cat(hits).double().mean().item()


@pytest.fixture(scope="module")
def other_text(
    trained: Callable[..., Path], base: Path, data: Path
) -> dict[str, tuple[float, float]]:
    """Measure the other text with plain PyTorch, before and after the training of one run."""
    lines = (data / "other.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    lora = train_case(trained, ZERO3_2) / "lora"
    models = {
        "before": load_base(base),
        "after": PeftModel.from_pretrained(load_base(base), lora),
    }
    return {when: measure_text(model, base, texts) for when, model in models.items()}


@pytest.mark.parametrize("case", make_params(LAUNCHES))
def test_other_text_is_predicted_as_by_plain_pytorch(
    case: LaunchCase, trained: Callable[..., Path], other_text: dict[str, tuple[float, float]]
) -> None:
    found = read_results(train_case(trained, case))["other_text"]
    for when, (loss, accuracy) in other_text.items():
        assert found[when]["loss"] == pytest.approx(loss, rel=1e-4)
        # Two of the 380 tokens are near ties.
        assert found[when]["accuracy"] == pytest.approx(accuracy, abs=2 / 380)


def test_training_changes_the_loss_on_other_text(trained: Callable[..., Path]) -> None:
    found = read_results(train_case(trained, ZERO3_1))["other_text"]
    assert found["after"]["loss"] != pytest.approx(found["before"]["loss"], rel=0.01)


@pytest.mark.parametrize("case", make_params(LAUNCHES))
def test_parameters_and_memory_are_counted_on_every_rank(
    case: LaunchCase, trained: Callable[..., Path]
) -> None:
    result = read_results(train_case(trained, case))
    # Rank 4 on two layers of 32 and 80 wide with two of four heads of keys and values.
    per_layer = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 80))
    assert result["trained_parameters"] == 2 * per_layer
    assert len(result["peak_memory"]) == case.world_size
    assert all(2**26 < size < 2**34 for size in result["peak_memory"])
