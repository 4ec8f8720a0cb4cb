"""Run every method that needs a calibration, from initialisation to export, sharded and alone.

Proves that a sharded run is the one of a single process, that the initial factors and the reference
statistics are those of their formulas, that gradients in windows find the same, and that a run
resumes bit for bit. One launch an engine runs all methods (workers/methods.py). About 50 s.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from astra import adapter, inits
from launch.config.loading import read_recipe
from launch.config.schema import Recipe
from launch.data.order import sample_examples
from tests.support.cases import METHODS, RESUMED_METHOD
from tests.support.paths import WORKERS
from tests.support.plain import (
    add_first_gradients,
    assert_weights_close,
    compute_answer_loss,
    load_base,
)
from tests.support.runs import read_calibration, read_losses, read_results

pytestmark = pytest.mark.xdist_group("methods")

SHARDED = ("zero3", "fsdp")


@pytest.fixture(scope="module")
def runs(
    launch: Callable, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return the folder of each engine's runs of all methods: one process, or two ranks."""
    folders = {}
    for engine in ("single", *SHARDED):
        folders[engine] = tmp_path_factory.mktemp(engine)
        ranks = 1 if engine == "single" else 2
        launch(WORKERS / "methods.py", recipe, engine, folders[engine], ranks=ranks)
    return folders


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("name", METHODS)
def test_a_sharded_run_is_the_unsharded_one(name: str, engine: str, runs: dict[str, Path]) -> None:
    run, alone = runs[engine] / name, runs["single"] / name
    found, wanted = (read_calibration(folder / "calibration") for folder in (run, alone))
    assert found.keys() == wanted.keys()
    # The numbers differ by the order of fp64 sums; only backward passes are fp32's.
    tolerance = 1e-5 if name.startswith("lora_ga") else 1e-9
    for key, value in wanted.items():
        if not key.endswith((".checks", ".angles")):
            atol = tolerance * value.abs().max().item()
            torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=key)
    losses = read_losses(run)
    assert losses == pytest.approx(read_losses(alone), rel=1e-4)
    assert len(losses) == 3
    drift = read_results(run)["logit_drift"]
    assert drift < 1e-5
    starts_on_base = name == "eva" or name.endswith("-zero")
    assert (run / "astra_init").is_dir() == (drift > 0) == (not starts_on_base)
    exported, other = (
        load_file(folder / "lora" / "adapter_model.safetensors") for folder in (run, alone)
    )
    assert exported.keys() == other.keys()
    for key, value in other.items():
        atol = 1e-3 * value.abs().max().item()
        torch.testing.assert_close(exported[key], value, rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_a_run_resumes_bit_for_bit(engine: str, runs: dict[str, Path]) -> None:
    whole = runs[engine] / RESUMED_METHOD
    resumed = runs[engine] / f"{RESUMED_METHOD}-resumed"
    assert read_losses(resumed) == read_losses(whole)
    for part in ("adapter", "lora"):
        a, b = (load_file(run / part / "adapter_model.safetensors") for run in (whole, resumed))
        assert all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_windows_of_gradients_find_what_one_window_does(engine: str, runs: dict[str, Path]) -> None:
    whole = runs[engine] / "lora_ga" / "calibration"
    windows = runs[engine] / "lora_ga-windows" / "calibration"
    assert len(list(windows.glob("window-*"))) == 2
    wanted, found = read_calibration(whole), read_calibration(windows)
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_the_initial_factors_are_the_formulas(
    runs: dict[str, Path], recipe: Path, base: Path
) -> None:
    settings = read_recipe(str(recipe), []).adapter
    model = load_base(base)
    initial = load_file(runs["fsdp"] / "milora" / "astra_init" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach()
    factors = inits.init_milora(weight, settings.rank, settings.alpha / settings.rank)
    for side, factor in zip("AB", factors, strict=True):
        stored = initial[f"base_model.model.{name}.lora_{side}.weight"]
        torch.testing.assert_close(stored, factor.float(), rtol=0, atol=1e-6)


def read_step(run: Path, step: int) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint."""
    return load_file(run / "checkpoints" / f"step-{step:07d}" / "tensors.safetensors")


@pytest.mark.parametrize("engine", ["single", *SHARDED])
@pytest.mark.parametrize("name", ["haar", "haar-zero", "largest-zero"])
def test_the_first_step_of_a_control_is_that_of_plain_algebra(
    name: str,
    engine: str,
    runs: dict[str, Path],
    recipe: Path,
    base: Path,
    rows: list[dict],
) -> None:
    """With G the loss's gradient at W, those of A and B are s B0^T G and s G A0^T."""
    settings = read_recipe(str(recipe), METHODS[name])
    scaling = settings.adapter.alpha / settings.adapter.rank
    model = load_base(base)
    add_first_gradients(model, settings, rows)
    first, second = (read_step(runs[engine] / name, step) for step in (0, 1))
    wanted = {}
    for module, linear in model.named_modules():
        if f"{module}.A.initial" not in first:
            continue
        weight, gradient = linear.weight.detach().double(), linear.weight.grad.double()
        a0, b0 = (first[f"{module}.{side}.initial"].double() for side in "AB")
        # Stored in fp32, so exact to its rounding.
        identity = torch.eye(len(a0), dtype=torch.float64)
        torch.testing.assert_close(b0.T @ b0, identity, rtol=0, atol=1e-6)
        if name.startswith("haar"):
            _, drawn = inits.init_haar(weight, len(a0), settings.calibration.seed, module)
            assert torch.equal(first[f"{module}.B.initial"], drawn.float())  # on every engine
        if name == "haar":
            torch.testing.assert_close(a0, b0.T @ weight, rtol=0, atol=1e-5)
        else:
            assert not a0.any()
        wanted[f"{module}.A"] = scaling * b0.T @ gradient
        wanted[f"{module}.B"] = scaling * gradient @ a0.T
    assert len(wanted) == 28
    norm = sum(gradient.square().sum() for gradient in wanted.values()).sqrt()
    clip = min(1, settings.train.max_grad_norm / norm)
    for key, gradient in wanted.items():
        found = second[f"{key}.exp_avg"] / 0.1  # AdamW's first moment is 0.1 of the first gradient
        atol = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(found, (clip * gradient).float(), rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_records_say_whether_examples_were_calibrated_on(
    engine: str, runs: dict[str, Path]
) -> None:
    run = runs[engine] / "haar"
    results = read_results(run)
    assert (results["variant"], results["calibration_data"]) == ("haar", None)
    assert results["seconds"]["calibration"] == 0
    assert not (run / "calibration").exists()
    assert "Initial factors from no calibration data." in (run / "README.md").read_text()
    run = runs[engine] / "largest-zero"
    results = read_results(run)
    assert results["variant"] == "largest zero start"
    manifest = json.loads((run / "calibration" / "manifest.json").read_text())
    assert results["calibration_data"] == {
        "path": results["data"]["path"],
        "tokens_sha256": results["data"]["tokens_sha256"],
        "examples": 11,
        "tokens": manifest["tokens"],
    }
    assert "from 11 calibration examples of " in (run / "README.md").read_text()
    assert read_results(runs[engine] / "milora")["calibration_data"] is None


@pytest.mark.parametrize("name", ["corda-kpm", "eva", "lora_ga"])
def test_the_exports_are_what_the_last_checkpoint_trained(
    name: str, runs: dict[str, Path], base: Path
) -> None:
    """lora/ on W, and adapter/ on W - s B0 A0, are both W + s (B A - B0 A0), added plainly."""
    run, scaling = runs["zero3"] / name, 1.5
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    first, last = (
        load_file(run / "checkpoints" / f"step-{step:07d}" / "tensors.safetensors")
        for step in (0, 3)
    )
    modules = [key.removesuffix(".A.initial") for key in first if key.endswith(".A.initial")]

    def make_model(trained: float, initial: float) -> PreTrainedModel:
        """Return the base with `trained` s B A and `initial` s B0 A0 added to its weights."""
        model = load_base(base)
        for module in modules:
            now = last[f"{module}.B.trained"] @ last[f"{module}.A.trained"]
            then = first[f"{module}.B.initial"] @ first[f"{module}.A.initial"]
            model.get_submodule(module).weight.data += scaling * (trained * now + initial * then)
        return model

    def compute(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    before, after = compute(make_model(0, 0)), compute(make_model(1, -1))
    moved = (after - before).abs().max()
    assert moved > 1e-3 * before.abs().max()
    # For eva B0 is 0, so that its residual is the base.
    bases = {"lora": make_model(0, 0), "adapter": make_model(0, -1)}
    for part, model in bases.items():
        exported = compute(PeftModel.from_pretrained(model, run / part))
        assert (exported - after).abs().max() < 1e-2 * moved


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_the_merged_model_is_plain_pefts(engine: str, runs: dict[str, Path], base: Path) -> None:
    run = runs[engine] / "olora"
    plain = PeftModel.from_pretrained(load_base(base), run / "lora").merge_and_unload()
    assert_weights_close(load_base(run / "merged"), plain)
    # The head is tied, as it was in the base, and the tokenizer is there.
    assert "lm_head.weight" not in load_file(run / "merged" / "model.safetensors")
    assert AutoTokenizer.from_pretrained(run / "merged").eos_token == "</s>"


@pytest.mark.parametrize("engine", ["single", *SHARDED])
@pytest.mark.parametrize(("name", "rank"), [("pissa", 3), ("olora", 5)])
def test_the_small_lora_is_the_best_of_its_rank(
    name: str, rank: int, engine: str, runs: dict[str, Path], recipe: Path, base: Path
) -> None:
    run = runs[engine] / name
    exact, small = (adapter.load_adapter(run / part) for part in ("lora", "lora_small"))
    assert exact[1] == small[1] == 1.0
    squares = torch.zeros(2, dtype=torch.float64)
    for module, (a, b) in exact[0].items():
        product = b.double() @ a.double()
        values = torch.linalg.svdvals(product)
        kept_a, kept_b = small[0][module]
        assert len(kept_a) == kept_b.shape[1] == rank
        left_out = (product - kept_b.double() @ kept_a.double()).norm()
        assert left_out == pytest.approx(values[rank:].norm().item(), abs=1e-5 * values.norm())
        squares += torch.stack([values[rank:].square().sum(), values.square().sum()])
    found = read_results(run)["small"]
    assert found["rank"] == rank
    error = (squares[0] / squares[1]).sqrt().item()
    assert found["error"] == pytest.approx(error, rel=1e-4)
    assert found["error"] <= found["worst_error"] < 1


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_the_loss_of_the_small_lora_is_measured_as_plain_peft_has_it(
    engine: str, runs: dict[str, Path], base: Path, rows: list[dict]
) -> None:
    run = runs[engine] / "olora"
    results, losses = read_results(run), {}
    for part in ("lora", "lora_small"):
        model = PeftModel.from_pretrained(load_base(base), run / part)
        losses[part] = compute_answer_loss(model, base, rows[-9:])
    measured = results["small"]["held_out"]["loss"]
    assert measured == pytest.approx(losses["lora_small"], rel=1e-5)
    assert results["held_out"]["after"]["loss"] == pytest.approx(losses["lora"], rel=1e-5)
    assert abs(losses["lora_small"] / losses["lora"] - 1) > 1e-4  # something was left out
    card = (run / "README.md").read_text()
    assert f"held-out loss {measured:.4f}, `lora/` has {losses['lora']:.4f}" in card
    assert "--max-lora-rank 8 --lora-modules tuned=lora_small" in card
    assert "hf upload USER/NAME lora ." in card
    unmeasured = runs[engine] / "pissa"
    assert "held_out" not in read_results(unmeasured)["small"]
    assert "was not measured, as data.held_out is 0" in (unmeasured / "README.md").read_text()


def collect_reference_outputs(
    recipe: Recipe, base: Path, rows: list[dict]
) -> dict[str, list[Tensor]]:
    """Collect the targets' scaled outputs with plain PyTorch, as the authors' code does.

    That code has another prompt and no EOS after the answer but as padding, which counts as text;
    y is divided by |max(y)|.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(base), load_base(base)
    outputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in recipe.adapter.targets:
            kept = outputs.setdefault(name, [])
            module.register_forward_hook(
                lambda _, args, y, kept=kept: kept.append(y[0].double() / abs(y.max().item()))
            )
    calibration = recipe.calibration
    for i in sample_examples(len(rows), calibration.samples, calibration.seed):
        ids = tokenizer(f"{rows[i]['query']}\n### Response:{rows[i]['response']}").input_ids
        padding = recipe.data.max_length - len(ids)
        padded = torch.tensor([ids + padding * [tokenizer.eos_token_id]])
        mask = torch.tensor([len(ids) * [1] + padding * [0]])
        with torch.no_grad():
            model(input_ids=padded[:, :-1], attention_mask=mask[:, :-1])
    return outputs


def test_the_reference_statistics_are_those_of_plain_pytorch(
    runs: dict[str, Path], recipe: Path, base: Path, rows: list[dict]
) -> None:
    settings = read_recipe(str(recipe), [])
    outputs = collect_reference_outputs(settings, base, rows)
    rank = settings.adapter.rank
    for engine in ("single", *SHARDED):
        found = read_calibration(runs[engine] / "reference" / "calibration")
        for name, parts in outputs.items():
            y = torch.cat(parts)
            moment = y.T @ y / len(y)
            values = torch.linalg.eigvalsh(moment)
            spectrum, vectors = found[f"{name}.spectrum"], found[f"{name}.vectors"]
            atol = 1e-6 * values[-1].item()
            torch.testing.assert_close(spectrum, values, rtol=1e-5, atol=atol, msg=name)
            energy = (vectors.T @ moment @ vectors).trace()
            torch.testing.assert_close(energy, values[-rank:].sum(), rtol=1e-5, atol=0, msg=name)


def test_rows_say_which_variant_they_are(runs: dict[str, Path]) -> None:
    folder = runs["single"]
    variants = {name: read_results(folder / name)["variant"] for name in METHODS}
    assert variants["corda-kpm"] == "kpm"
    assert variants["reference"] == "largest reference"
    assert variants["pissa"] is variants["eva"] is variants["lora_ga"] is None
    assert "fine-tuned: corda kpm" in (folder / "corda-kpm" / "README.md").read_text()
    path = folder / "reference" / "calibration" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["statistics"] == "reference"
    assert manifest["prompt"] == "{instruction}\n### Response:{answer}"
