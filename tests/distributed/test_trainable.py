"""rslora, dora and full fine-tuning under ZeRO-3, FSDP2 and in one process: the losses of plain PEFT and PyTorch.

The oracle is an independent loop (tests/support/plain.py); each worker script runs all methods in one process a rank.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from launch.config.schema import Recipe, read
from tests.distributed.workers.trainable import CASES, STEPS
from tests.support.plain import load_base, logits, plain_training

pytestmark = pytest.mark.xdist_group("trainable")

SHARDED = ("zero3", "fsdp")


@pytest.fixture(scope="module")
def runs(
    launch: Callable,
    recipe: Path,
    base: Path,
    rows: list[dict],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict:
    """Engine -> folder of its runs; those of `single` go on from the middles of the others'."""
    folders = {engine: tmp_path_factory.mktemp(engine) for engine in (*SHARDED, "single")}
    ids = AutoTokenizer.from_pretrained(base)([rows[0]["query"]]).input_ids
    for engine, folder in folders.items():
        (folder / "ids.json").write_text(json.dumps(ids))
        sources = [folders[other] for other in SHARDED] if engine == "single" else []
        launch(
            "tests/distributed/workers/trainable.py",
            *(recipe, folder, engine, *sources),
            ranks=1 if engine == "single" else 3,  # shards of unequal size
        )
    return folders


def settings(recipe: Path, method: str) -> Recipe:
    return read(str(recipe), [*STEPS, *CASES[method]])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def start(run: Path, base: Path, method: str, recipe: Recipe) -> nn.Module:
    """The model in plain PEFT or transformers as the run's training began with it."""
    wanted, model = recipe.adapter, load_base(base)
    if method == "full":
        return model
    variant = {f"use_{method}": True}
    config = LoraConfig(
        r=wanted.rank, lora_alpha=wanted.alpha, target_modules=wanted.targets, **variant
    )
    model = get_peft_model(model, config)
    initial = load_file(run / "checkpoints" / "step-0000000" / "tensors.safetensors")
    with torch.no_grad():
        for key, value in initial.items():
            module, side, kind = key.rsplit(".", 2)
            assert kind == "initial"
            getattr(model.get_base_model().get_submodule(module), f"lora_{side}")[
                "default"
            ].weight.copy_(value)
    return model


def exported(run: Path, base: Path, method: str) -> nn.Module:
    """What the run exported, loaded by plain PEFT or transformers."""
    if method == "full":
        return load_base(run / "model")
    return PeftModel.from_pretrained(
        load_base(base), run / {"rslora": "lora", "dora": "adapter"}[method]
    )


@pytest.mark.parametrize("method", ["rslora", "dora", "full"])
def test_losses_and_exports_equal_plain_training(
    method: str, runs: dict[str, Path], recipe: Path, base: Path, rows: list[dict]
) -> None:
    wanted = settings(recipe, method)
    model = start(runs["zero3"] / method, base, method, wanted)
    before = logits(model, base, rows)
    losses_of_oracle, _ = plain_training(model, wanted, rows)
    reached = logits(model, base, rows)
    moved = (reached - before).abs().max()
    assert losses_of_oracle[-1] < 0.95 * losses_of_oracle[0]
    for engine in SHARDED:
        run = runs[engine] / method
        # 1e-4: contract 1, for fp32 and other orders of its sums.
        assert losses(run) == pytest.approx(losses_of_oracle, rel=1e-4)
        loaded = exported(run, base, method)
        assert (logits(loaded, base, rows) - reached).abs().max() < 1e-2 * moved
        sharded = torch.load(run / "logits.pt", weights_only=True)
        ids = torch.tensor(json.loads((runs[engine] / "ids.json").read_text()))
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.eval()(input_ids=ids).logits,
                sharded,
                rtol=0,
                atol=1e-5 * sharded.abs().max(),
            )


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_on_bit_for_bit_and_elsewhere(case: str, runs: dict[str, Path]) -> None:
    for number, engine in enumerate(SHARDED):
        whole = losses(runs[engine] / case)
        assert losses(runs[engine] / f"{case}-again-0") == whole
        tolerance = 1e-2 if case == "full_bf16" else 1e-4  # each engine rounds at other places
        assert losses(runs["single"] / f"{case}-again-{number}") == pytest.approx(
            whole, rel=tolerance
        )


@pytest.mark.parametrize("engine", SHARDED)
def test_full_bf16_steps_fp32_weights_and_exports_bf16(engine: str, runs: dict[str, Path]) -> None:
    run = runs[engine] / "full_bf16"
    trained = load_file(run / "checkpoints" / "step-0000004" / "tensors.safetensors")
    exported = load_file(run / "model" / "model.safetensors")
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in exported.items():
        weight = trained[f"{name}.trained"]
        assert weight.dtype == torch.float32
        assert torch.equal(weight.bfloat16(), value)
    weights = [trained[f"{name}.trained"] for name in exported]
    assert sum((weight != weight.bfloat16()).sum() for weight in weights) > 0.9 * sum(
        map(torch.numel, weights)
    )


@pytest.mark.parametrize("method", ["rslora", "dora", "full"])
def test_results_and_model_card_say_what_was_trained(method: str, runs: dict[str, Path]) -> None:
    run = runs["fsdp"] / method
    results, card = json.loads((run / "results.json").read_text()), (run / "README.md").read_text()
    assert (results["method"], results["eigen_select"], results["logit_drift"]) == (method, None, 0)
    match method:
        case "rslora":
            assert json.loads((run / "lora" / "adapter_config.json").read_text())["use_rslora"]
            assert (results["rank"], results["lora_rank"]) == (4, 4)
        case "dora":
            assert (results["rank"], results["lora_rank"]) == (4, None)
            assert 'from_pretrained(model, "adapter")' in card
            assert not (run / "lora").exists()
        case "full":
            assert (results["rank"], results["lora_rank"], results["alpha"]) == (None, None, None)
            assert "All parameters trained" in card
            assert 'from_pretrained("model")' in card
            assert "lm_head.weight" not in load_file(
                run / "model" / "model.safetensors"
            )  # tied, as it was
