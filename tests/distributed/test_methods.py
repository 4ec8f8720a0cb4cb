"""Every method that a calibration is made for, from initialisation to export and resume: sharded as in one process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from astra import inits
from launch.config.schema import read
from launch.data.tokenize import choose
from tests.distributed.workers.methods import AGAIN, METHODS
from tests.support.plain import load_base

pytestmark = pytest.mark.xdist_group("methods")

SHARDED = ("zero3", "fsdp")


@pytest.fixture(scope="module")
def runs(
    launch: Callable, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Engine -> the folder with a run of each method: in one process, and on two ranks."""
    made = {}
    for engine in ("single", *SHARDED):
        made[engine] = tmp_path_factory.mktemp(engine)
        ranks = 1 if engine == "single" else 2
        launch("tests/distributed/workers/methods.py", recipe, engine, made[engine], ranks=ranks)
    return made


def found(run: Path) -> dict[str, Tensor]:
    """All that the calibration of a run found."""
    return {
        k: v
        for path in sorted(run.glob("calibration/window-*.safetensors"))
        for k, v in load_file(path).items()
    }


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("name", METHODS)
def test_a_sharded_run_is_the_unsharded_one(name: str, engine: str, runs: dict[str, Path]) -> None:
    run, alone = runs[engine] / name, runs["single"] / name
    ours, wanted = found(run), found(alone)
    assert ours.keys() == wanted.keys()
    # Same numbers but for the order of fp64 sums; only backward passes in fp32 differ between engines.
    tolerance = 1e-5 if name.startswith("lora_ga") else 1e-9
    for key, value in wanted.items():
        if not key.endswith((".checks", ".angles")):
            torch.testing.assert_close(
                ours[key], value, rtol=0, atol=tolerance * value.abs().max().item(), msg=key
            )
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert len(losses(run)) == 3
    results = json.loads((run / "results.json").read_text())
    assert results["logit_drift"] < 1e-5
    assert (run / "astra_init").is_dir() == (results["logit_drift"] > 0) == (name != "eva")
    exported, other = (load_file(of / "lora" / "adapter_model.safetensors") for of in (run, alone))
    assert exported.keys() == other.keys()
    for key, value in other.items():
        torch.testing.assert_close(
            exported[key], value, rtol=0, atol=1e-3 * value.abs().max().item(), msg=key
        )


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_a_run_taken_up_again_goes_on_as_it_would_have(engine: str, runs: dict[str, Path]) -> None:
    whole, again = runs[engine] / AGAIN, runs[engine] / f"{AGAIN}-again"
    assert losses(again) == losses(whole)
    for part in ("adapter", "lora"):
        a, b = (load_file(run / part / "adapter_model.safetensors") for run in (whole, again))
        assert all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_windows_of_gradients_find_what_one_window_does(engine: str, runs: dict[str, Path]) -> None:
    whole, parts = runs[engine] / "lora_ga", runs[engine] / "lora_ga-windows"
    assert len(list(parts.glob("calibration/window-*"))) == 2
    wanted, ours = found(whole), found(parts)
    assert all(torch.equal(value, ours[key]) for key, value in wanted.items())


def test_the_initial_factors_are_the_formulas(
    runs: dict[str, Path], recipe: Path, base: Path
) -> None:
    settings = read(str(recipe), []).adapter
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    initial = load_file(runs["fsdp"] / "milora" / "astra_init" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a0, b0 = inits.milora(
        model.get_submodule(name).weight.detach(), settings.rank, settings.alpha / settings.rank
    )
    torch.testing.assert_close(
        initial[f"base_model.model.{name}.lora_A.weight"], a0.float(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        initial[f"base_model.model.{name}.lora_B.weight"], b0.float(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["corda-kpm", "eva", "lora_ga"])
def test_what_is_exported_is_what_the_last_checkpoint_trained(
    name: str, runs: dict[str, Path], base: Path
) -> None:
    """lora/ on the base, and adapter/ on W - s B0 A0, are both W + s (B A - B0 A0), plainly added."""
    run, scaling = runs["zero3"] / name, 1.5
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    first, last = (
        load_file(run / "checkpoints" / f"step-{n:07d}" / "tensors.safetensors") for n in (0, 3)
    )

    def plain(trained: float, initial: float) -> PreTrainedModel:
        model = load_base(base)
        for key in [key for key in first if key.endswith(".A.initial")]:
            module = key.removesuffix(".A.initial")
            now = last[f"{module}.B.trained"] @ last[f"{module}.A.trained"]
            then = first[f"{module}.B.initial"] @ first[key]
            model.get_submodule(module).weight.data += scaling * (trained * now + initial * then)
        return model

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    before, after = logits(plain(0, 0)), logits(plain(1, -1))
    moved = (after - before).abs().max()
    assert moved > 1e-3 * before.abs().max()
    exports = {
        "lora": plain(0, 0),
        "adapter": plain(0, -1),
    }  # eva's B0 is 0, so that its residual is the base
    for part, model in exports.items():
        assert (
            logits(PeftModel.from_pretrained(model, run / part)) - after
        ).abs().max() < 1e-2 * moved


def test_the_reference_statistics_are_those_of_plain_pytorch(
    runs: dict[str, Path], recipe: Path, base: Path, rows: list[dict]
) -> None:
    """As the authors' code: another prompt, no EOS after the answer but as padding, which counts; y / |max(y)|."""
    of, tokenizer, model = (
        read(str(recipe), []),
        AutoTokenizer.from_pretrained(base),
        load_base(base),
    )
    outputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in of.adapter.targets:
            keep = outputs.setdefault(name, [])
            module.register_forward_hook(
                lambda _, args, y, keep=keep: keep.append(y[0].double() / abs(y.max().item()))
            )
    for i in choose(len(rows), of.calibration.samples, of.calibration.seed):
        ids = tokenizer(f"{rows[i]['query']}\n### Response:{rows[i]['response']}").input_ids
        padding = of.data.max_length - len(ids)
        padded = torch.tensor([ids + padding * [tokenizer.eos_token_id]])
        mask = torch.tensor([len(ids) * [1] + padding * [0]])
        with torch.no_grad():
            model(input_ids=padded[:, :-1], attention_mask=mask[:, :-1])
    for engine in ("single", *SHARDED):
        seen = found(runs[engine] / "reference")
        for name, parts in outputs.items():
            y = torch.cat(parts)
            moment = y.T @ y / len(y)
            values = torch.linalg.eigvalsh(moment)
            torch.testing.assert_close(
                seen[f"{name}.spectrum"], values, rtol=1e-5, atol=1e-6 * values[-1].item(), msg=name
            )
            vectors = seen[f"{name}.vectors"]
            image = vectors.T @ moment @ vectors
            torch.testing.assert_close(
                image.trace(), values[-of.adapter.rank :].sum(), rtol=1e-5, atol=0, msg=name
            )


def test_rows_say_which_variant_they_are(runs: dict[str, Path]) -> None:
    results = {
        name: json.loads((runs["single"] / name / "results.json").read_text()) for name in METHODS
    }
    variants = {name: row["variant"] for name, row in results.items()}
    assert variants["corda-kpm"] == "kpm"
    assert variants["reference"] == "largest reference"
    assert variants["pissa"] is variants["eva"] is variants["lora_ga"] is None
    page = (runs["single"] / "corda-kpm" / "README.md").read_text()
    assert "fine-tuned: corda kpm" in page
    manifest = json.loads(
        (runs["single"] / "reference" / "calibration" / "manifest.json").read_text()
    )
    assert manifest["statistics"] == "reference"
    assert manifest["prompt"] == "{instruction}\n### Response:{answer}"
