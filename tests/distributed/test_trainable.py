"""Train with rsLoRA, DoRA, LoRA+ and all parameters under ZeRO-3, FSDP2 and in one process.

Proves that losses and exports are those of plain PEFT and PyTorch (tests/support/plain.py), and
that a checkpoint resumes bit for bit on the same engine and to rounding on another. One launch an
engine runs all methods (workers/trainable.py), on three ranks where it is sharded. About 40 s.
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

from launch.config.loading import read_recipe
from launch.config.schema import Recipe
from tests.support.cases import TRAINABLE_METHODS, TRAINABLE_STEPS
from tests.support.paths import WORKERS
from tests.support.plain import (
    assert_weights_close,
    compute_logits,
    load_base,
    train_plainly,
)
from tests.support.runs import read_losses, read_metrics, read_results

pytestmark = pytest.mark.xdist_group("trainable")

SHARDED = ("zero3", "fsdp")
METHODS = ("rslora", "dora", "lora-plus", "dora-plus", "full")


@pytest.fixture(scope="module")
def runs(
    launch: Callable,
    recipe: Path,
    base: Path,
    rows: list[dict],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Return the folder of each engine's runs. `single` resumes those of the others halfway."""
    folders = {engine: tmp_path_factory.mktemp(engine) for engine in (*SHARDED, "single")}
    ids = AutoTokenizer.from_pretrained(base)([rows[0]["query"]]).input_ids
    for engine, folder in folders.items():
        (folder / "ids.json").write_text(json.dumps(ids))
        sources = [folders[other] for other in SHARDED] if engine == "single" else []
        ranks = 1 if engine == "single" else 3  # shards of unequal size
        methods = ",".join(TRAINABLE_METHODS)
        launch(WORKERS / "trainable.py", recipe, folder, engine, methods, *sources, ranks=ranks)
    return folders


@pytest.fixture(scope="module")
def plus_runs(
    launch: Callable, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return the folders of LoRA+ runs of the other engines."""
    folders = {}
    for engine, ranks in (("single", 1), ("zero2", 2), ("zero3_offload", 2)):
        folders[engine] = tmp_path_factory.mktemp(engine)
        (folders[engine] / "ids.json").write_text("[[1]]")
        line = [recipe, folders[engine], engine, "lora-plus"]
        launch(WORKERS / "trainable.py", *line, ranks=ranks)
    return folders


def prepare_model(run: Path, base: Path, method: str, recipe: Recipe) -> nn.Module:
    """Return the model in plain PEFT or transformers as the run's training began with it."""
    settings, model = recipe.adapter, load_base(base)
    if method == "full":
        return model
    name = settings.method
    variant = {} if name == "lora" else {f"use_{name}": True}
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets, **variant
    )
    model = get_peft_model(model, config)
    initial = load_file(run / "checkpoints" / "step-0000000" / "tensors.safetensors")
    with torch.no_grad():
        for key, value in initial.items():
            module, side, kind = key.rsplit(".", 2)
            assert kind == "initial"
            layer = model.get_base_model().get_submodule(module)
            getattr(layer, f"lora_{side}")["default"].weight.copy_(value)
    return model


def load_export(run: Path, base: Path, method: str) -> nn.Module:
    """Load the run's export with plain PEFT or transformers."""
    if method == "full":
        return load_base(run / "model")
    part = "adapter" if method.startswith("dora") else "lora"
    return PeftModel.from_pretrained(load_base(base), run / part)


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_exports_equal_plain_training(
    method: str, runs: dict[str, Path], recipe: Path, base: Path, rows: list[dict]
) -> None:
    settings = read_recipe(str(recipe), [*TRAINABLE_STEPS, *TRAINABLE_METHODS[method]])
    model = prepare_model(runs["zero3"] / method, base, method, settings)
    before = compute_logits(model, base, rows)
    losses, _ = train_plainly(model, settings, rows)
    reached = compute_logits(model, base, rows)
    moved = (reached - before).abs().max()
    assert losses[-1] < 0.95 * losses[0]
    for engine in SHARDED:
        run = runs[engine] / method
        # 1e-4: for fp32 and other orders of its sums.
        assert read_losses(run) == pytest.approx(losses, rel=1e-4)
        export = load_export(run, base, method)
        assert (compute_logits(export, base, rows) - reached).abs().max() < 1e-2 * moved
        sharded = torch.load(run / "logits.pt", weights_only=True)
        ids = torch.tensor(json.loads((runs[engine] / "ids.json").read_text()))
        with torch.no_grad():
            exported = export.eval()(input_ids=ids).logits
        tolerance = 1e-5 * sharded.abs().max()
        torch.testing.assert_close(exported, sharded, rtol=0, atol=tolerance)


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_dora_is_merged_as_plain_peft_merges_it(
    engine: str, runs: dict[str, Path], base: Path
) -> None:
    folder = runs[engine] / ("dora-resumed-0" if engine == "single" else "dora")
    plain = PeftModel.from_pretrained(load_base(base), folder / "adapter").merge_and_unload()
    merged = load_base(folder / "merged")
    assert_weights_close(merged, plain)


@pytest.mark.parametrize("name", TRAINABLE_METHODS)
def test_a_checkpoint_resumes_bit_for_bit_and_elsewhere(name: str, runs: dict[str, Path]) -> None:
    for number, engine in enumerate(SHARDED):
        whole = read_losses(runs[engine] / name)
        assert read_losses(runs[engine] / f"{name}-resumed-0") == whole
        # In bf16 each engine rounds at other places.
        tolerance = 1e-2 if name == "full_bf16" else 1e-4
        elsewhere = read_losses(runs["single"] / f"{name}-resumed-{number}")
        assert elsewhere == pytest.approx(whole, rel=tolerance)


@pytest.mark.parametrize("engine", SHARDED)
def test_full_bf16_steps_fp32_weights_and_exports_bf16(engine: str, runs: dict[str, Path]) -> None:
    run = runs[engine] / "full_bf16"
    trained = load_file(run / "checkpoints" / "step-0000004" / "tensors.safetensors")
    exported = load_file(run / "model" / "model.safetensors")
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    weights = {name: trained[f"{name}.trained"] for name in exported}
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.bfloat16(), exported[name])
    between = sum((weight != weight.bfloat16()).sum() for weight in weights.values())
    assert between > 0.9 * sum(weight.numel() for weight in weights.values())


def test_lora_plus_equals_plain_training_with_two_groups_and_resumes_on_every_engine(
    plus_runs: dict[str, Path], recipe: Path, base: Path, rows: list[dict]
) -> None:
    settings = read_recipe(str(recipe), [*TRAINABLE_STEPS, *TRAINABLE_METHODS["lora-plus"]])
    model = prepare_model(plus_runs["zero2"] / "lora-plus", base, "lora-plus", settings)
    wanted, norms = train_plainly(model, settings, rows)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for folder in plus_runs.values():
        run = folder / "lora-plus"
        steps = read_metrics(run)
        assert [step["loss"] for step in steps] == pytest.approx(wanted, rel=1e-4)
        assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-4)
        assert read_losses(folder / "lora-plus-resumed-0") == [step["loss"] for step in steps]
        exported = load_file(run / "adapter" / "adapter_model.safetensors")
        other = load_file(folder / "lora-plus-resumed-0" / "adapter" / "adapter_model.safetensors")
        assert exported.keys() == other.keys() and len(exported) == len(trained)
        for name, value in trained.items():
            key = name.replace(".default", "")
            atol = 1e-3 * value.abs().max().item()
            torch.testing.assert_close(exported[key], value, rtol=0, atol=atol, msg=key)
            assert torch.equal(exported[key], other[key])


@pytest.mark.parametrize("method", METHODS)
def test_results_and_model_card_say_what_was_trained(method: str, runs: dict[str, Path]) -> None:
    run = runs["fsdp"] / method
    results, card = read_results(run), (run / "README.md").read_text()
    name, _, plus = method.partition("-")
    assert (results["method"], results["eigen_select"], results["logit_drift"]) == (name, None, 0)
    ratio = {"lora-plus": 16, "dora-plus": 4}.get(method)
    assert results.get("lr_ratio") == ratio
    assert results["variant"] == (f"lr_ratio {ratio}" if plus else None)
    ranks = (results["rank"], results["lora_rank"])
    match method:
        case "rslora":
            config = json.loads((run / "lora" / "adapter_config.json").read_text())
            assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (False, 4, 4)
            assert ranks == (4, 4)
        case "lora-plus":
            assert ranks == (4, 4)
            assert "lora lr_ratio 16" in card
        case "dora" | "dora-plus":
            assert ranks == (4, None)
            assert 'from_pretrained(model, "adapter")' in card
            assert not (run / "lora").exists()
        case "full":
            assert (*ranks, results["alpha"]) == (None, None, None)
            assert "All parameters trained" in card
            assert 'from_pretrained("model")' in card
            # The head is tied, as it was in the base.
            assert "lm_head.weight" not in load_file(run / "model" / "model.safetensors")
