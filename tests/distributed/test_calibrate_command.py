"""Start launch/calibrate.py as real processes.

Proves that a calibration in windows resumes after a kill, that a run takes it and names what
differs, that LoRA ranks follow effective ranks, and that `--after` measures what plain
transformers, PEFT and PyTorch do. About 45 s.
"""

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.config.loading import read_recipe
from launch.data.order import sample_examples
from launch.data.prompts import format_prompt
from tests.support.cases import NO_SCORES
from tests.support.paths import WORKERS
from tests.support.plain import load_base
from tests.support.processes import make_set_options
from tests.support.runs import read_calibration, read_facts, read_losses, read_results

pytestmark = pytest.mark.xdist_group("calibration")

# Memory for one layer, so that there are two windows.
WINDOWS = make_set_options(["calibration.memory_gib=0.00037", "calibration.split_half=true"])


@pytest.fixture(scope="module")
def whole(launch: Callable, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrate in windows on two ranks, undisturbed; the calibration's folder."""
    folder = tmp_path_factory.mktemp("calibration") / "whole"
    done = launch("launch/calibrate.py", "--recipe", recipe, *WINDOWS, "--output", folder, ranks=2)
    assert "2 windows of up to 1 layers" in done.stdout
    return folder


def test_the_folder_holds_plots_a_page_and_the_spectra(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        *("manifest.json", "spectrum.json", "README.md", "lock"),
        *("window-0000.safetensors", "window-0001.safetensors"),
        *("spectrum.png", "effective_rank.png", "largest_angle.png"),
    }
    seen = json.loads((whole / "spectrum.json").read_text())
    assert len(seen["modules"]) == 14
    assert 0 < max(seen["worst_checks"].values()) <= 1
    gate = seen["modules"]["model.layers.1.mlp.gate_proj"]  # 80 outputs of 32 inputs and a bias
    assert (gate["size"], gate["reach"], gate["zero_eigenvalues"], gate["rank"]) == (80, 33, 47, 4)
    assert gate["tail_energy_share"] == gate["largest_angle"] == 0
    query = seen["modules"]["model.layers.1.self_attn.q_proj"]
    assert 1 < query["effective_rank"] < 32
    assert 0 < query["largest_angle"] <= 90
    page = (whole / "README.md").read_text()
    assert "| gate_proj (2) | 80 | 4 | 47 |" in page
    assert "![largest angle](largest_angle.png)" in page


def test_killed_in_the_middle_it_resumes_after_the_last_window(
    launch: Callable, whole: Path, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "calibration"
    line = ["--recipe", recipe, *WINDOWS, "--engine", "fsdp", "--output", folder]
    killed = launch(WORKERS / "fault.py", "window", *line, ranks=2, check=False)
    assert killed.returncode != 0
    files = {path.name for path in folder.iterdir()}
    assert files == {"unfinished.json", "window-0000.safetensors", "lock"}
    first_window = (folder / "window-0000.safetensors").read_bytes()

    again = launch("launch/calibrate.py", *line, ranks=2)
    assert "resuming after window 1 of 2" in again.stdout
    assert (folder / "window-0000.safetensors").read_bytes() == first_window
    found, wanted = read_calibration(folder), read_calibration(whole)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # The hidden states of FSDP2 and of ZeRO-3 agree to fp32's rounding.
        if name.endswith(".spectrum"):
            atol = 1e-5 * value.max().item()
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=atol, msg=name)

    assert (
        "already holds this calibration, finished"
        in launch("launch/calibrate.py", *line, ranks=2).stdout
    )


def test_a_limit_that_is_decided_is_the_least_of_the_ranks_and_stays_after_a_kill(
    launch: Callable, recipe: Path, tmp_path: Path
) -> None:
    """Simulated: the memory that is free (workers/scarce.py)."""
    folder = tmp_path / "calibration"
    options = make_set_options(["calibration.split_half=true", "calibration.reduction=owner"])
    line = ["--recipe", recipe, *options, "--engine", "fsdp", "--output", folder]
    # Rank 1 has memory for one layer, rank 0 for both.
    killed = launch(WORKERS / "scarce.py", "64,2.475", "killed", *line, ranks=2, check=False)
    assert killed.returncode != 0
    assert "calibration.memory_gib: auto is 0.00037 GiB on each rank: " in killed.stdout
    assert "2 windows of up to 1 layers" in killed.stdout
    first_window = (folder / "window-0000.safetensors").read_bytes()

    again = launch(WORKERS / "scarce.py", "64,64", "whole", *line, ranks=2)
    assert "auto stays 0.00037 GiB, as it was begun with" in again.stdout
    assert "resuming after window 1 of 2" in again.stdout
    assert (folder / "window-0000.safetensors").read_bytes() == first_window
    conditions = json.loads((folder / "manifest.json").read_text())["conditions"]
    assert 0.00036 < conditions["memory_gib"] < 0.00038
    assert conditions["reduction"] == "owner"

    # The same windows from a limit that is set, and all-reduced by two ranks: the same bits.
    other = tmp_path / "other"
    line = ["--recipe", recipe, *WINDOWS, "--engine", "fsdp", "--output", other]
    launch("launch/calibrate.py", *line, ranks=2)
    found, wanted = read_calibration(folder), read_calibration(other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())

    line[-1] = tmp_path / "refused"
    line[2:6] = []
    refused = launch(WORKERS / "scarce.py", "64,1", "whole", *line, ranks=2, check=False)
    assert refused.returncode != 0
    message = "error: calibration.memory_gib: 0 GiB is below the"
    assert message in refused.stderr + refused.stdout


def test_a_run_takes_it_and_names_what_differs(
    launch: Callable, trained: Callable[..., Path], whole: Path, recipe: Path, tmp_path: Path
) -> None:
    run, own = tmp_path / "run", trained(2)
    options = make_set_options([f"calibration.path={whole}", "train.max_steps=2", NO_SCORES])
    done = launch("launch/train.py", "--recipe", recipe, *options, "--output", run, ranks=2)
    assert f"calibration: taken from {whole}" in done.stdout
    checkpointing = {"train.gradient_checkpointing": False}
    assert read_results(run)["decided"] == checkpointing  # there was nothing else to decide
    conditions = json.loads((own / "calibration" / "manifest.json").read_text())["conditions"]
    decided = checkpointing | {"calibration.memory_gib": conditions["memory_gib"]}
    assert read_results(own)["decided"] == read_facts(own)["decided"] == decided
    assert conditions["memory_gib"] > 0.01
    taken_files, own_files = (
        sorted((folder / "astra_init").rglob("*.safetensors")) for folder in (run, own)
    )
    for taken_file, own_file in zip(taken_files, own_files, strict=True):
        taken, made = load_file(taken_file), load_file(own_file)
        assert made.keys() == taken.keys()
        for name, value in made.items():  # to the rounding of sums over two halves of the samples
            torch.testing.assert_close(taken[name], value, rtol=0, atol=1e-5)
    assert (run / "calibration" / "spectrum.png").is_file()
    assert not list((run / "calibration").glob("window-*"))

    differs = make_set_options([f"calibration.path={whole}", "adapter.eigen_select=largest"])
    line = ["--recipe", recipe, *differs, "--output", tmp_path / "x"]
    refused = launch("launch/train.py", *line, ranks=2, check=False)
    assert refused.returncode != 0
    assert "error: adapter.eigen_select: the calibration in" in refused.stderr + refused.stdout


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_ranks_follow_the_effective_ranks_and_reach_the_exported_lora(
    engine: str, trained: Callable[..., Path], base: Path
) -> None:
    settings = (
        "adapter.rank_allocation=effective_rank",
        "train.max_steps=3",
        NO_SCORES,
        "adapter.rank=6",
    )
    run = trained(2, *settings, f"engine={engine}")
    modules = json.loads((run / "calibration" / "spectrum.json").read_text())["modules"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "lora")
    config = model.peft_config["default"]
    ranks = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            assert len(a) == config.r == config.lora_alpha  # one rank in the file, and scale 1
            # A smaller rank is padded with zeros in both. (A0 has zeros of its own.)
            is_used = a.any(1) | b.any(0)
            ranks[name.removeprefix("base_model.model.")] = int(is_used.sum())
    assert max(ranks.values()) == config.r
    assert sum(ranks.values()) == 2 * 6 * 14  # dW of rank 2 r each
    assert len(set(ranks.values())) > 2
    effective = {name: module["effective_rank"] for name, module in modules.items()}
    assert max(ranks, key=ranks.get) == max(effective, key=effective.get)
    other = trained(1, *settings, "engine=single")
    assert read_losses(run) == pytest.approx(read_losses(other), rel=1e-4)


def compute_effective_ranks(
    model: nn.Module, targets: list[str], samples: list[torch.Tensor]
) -> dict[str, float]:
    """Return the effective rank of every target's outputs, computed a sample at a time.

    That is exp of the entropy of the shares of the eigenvalues of the outputs' second moment.
    """
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            kept = outputs.setdefault(name, [])
            module.register_forward_hook(
                lambda _, args, output, kept=kept: kept.append(output[0].double())
            )
    with torch.no_grad():
        for ids in samples:
            model.eval()(input_ids=ids[None])
    ranks = {}
    for name, parts in outputs.items():
        y = torch.cat(parts)
        shares = torch.linalg.eigvalsh(y.T @ y / len(y))
        shares = shares[shares > 0] / shares.sum()
        ranks[name] = math.exp(-(shares * shares.log()).sum())
    return ranks


@pytest.mark.parametrize(
    ("method", "engine"),
    [("lora", "single"), ("astra", "fsdp"), ("dora", "zero3"), ("full", "fsdp")],
)
def test_effective_ranks_before_and_after_are_those_of_plain_models(
    method: str,
    engine: str,
    launch: Callable,
    trained: Callable[..., Path],
    recipe: Path,
    base: Path,
    rows: list[dict],
    tmp_path: Path,
) -> None:
    finished = trained(1, NO_SCORES, "engine=single", f"adapter.method={method}")
    run = shutil.copytree(finished, tmp_path / "run")
    ranks = 1 if engine == "single" else 2
    launch("launch/calibrate.py", "--after", run, "--engine", engine, ranks=ranks)
    found = json.loads((run / "after" / "effective_rank.json").read_text())
    assert (run / "after" / "effective_rank.png").read_bytes().startswith(b"\x89PNG")

    settings, tokenizer = read_recipe(str(recipe), []), AutoTokenizer.from_pretrained(base)
    calibration = settings.calibration
    samples = []
    for i in sample_examples(len(rows), calibration.samples, calibration.seed):
        text = f"{format_prompt(rows[i]['query'])}{rows[i]['response']}\n"
        samples.append(torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]))
    if method == "full":
        trained_model = load_base(run / "model")
    else:
        export = run / ("adapter" if method == "dora" else "lora")
        trained_model = PeftModel.from_pretrained(load_base(base), export).merge_and_unload()
    wanted = {
        when: compute_effective_ranks(model, settings.adapter.targets, samples)
        for when, model in (("before", load_base(base)), ("after", trained_model))
    }
    assert len(found) == 14
    for when, effective in wanted.items():
        measured = {name: module[when] for name, module in found.items()}
        assert measured == pytest.approx(effective, rel=1e-5)
    moved = [abs(rank / wanted["before"][name] - 1) for name, rank in wanted["after"].items()]
    # Far above the tolerance, so that `before` cannot stand for `after`.
    assert statistics.median(moved) > 1e-3
