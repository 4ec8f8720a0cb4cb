"""launch/calibrate.py in real processes: windows, a kill in the middle, reuse by runs, effective ranks.

Those before and after a run are held against plain transformers, PEFT and PyTorch.
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

from launch.config.schema import read
from launch.data.tokenize import choose, prompt
from tests.support.plain import load_base

pytestmark = pytest.mark.xdist_group("calibration")

WORKER = Path(__file__).parent / "workers" / "fault.py"
WINDOWS = [
    "--set",
    "calibration.memory_gib=0.00037",
    "--set",
    "calibration.split_half=true",
]  # a layer a window


@pytest.fixture(scope="module")
def whole(launch: Callable, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration in windows on two ranks, undisturbed."""
    folder = tmp_path_factory.mktemp("calibration") / "whole"
    done = launch("launch/calibrate.py", "--recipe", recipe, *WINDOWS, "--output", folder, ranks=2)
    assert "2 windows of up to 1 layers" in done.stdout
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v
        for path in sorted(folder.glob("window-*.safetensors"))
        for k, v in load_file(path).items()
    }


def test_what_there_is_to_see(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        *("manifest.json", "spectrum.json", "README.md", "lock"),
        *("window-0000.safetensors", "window-0001.safetensors"),
        *("spectrum.png", "effective_rank.png", "largest_angle.png"),
    }
    seen = json.loads((whole / "spectrum.json").read_text())
    assert len(seen["modules"]) == 14
    assert 0 < max(seen["worst_checks"].values()) <= 1
    of = seen["modules"]["model.layers.1.mlp.gate_proj"]  # 80 outputs of 32 inputs and a bias
    assert (of["size"], of["reach"], of["zero_eigenvalues"], of["rank"]) == (80, 33, 47, 4)
    assert of["tail_energy_share"] == of["largest_angle"] == 0
    of = seen["modules"]["model.layers.1.self_attn.q_proj"]
    assert 1 < of["effective_rank"] < 32
    assert 0 < of["largest_angle"] <= 90
    page = (whole / "README.md").read_text()
    assert "| gate_proj (2) | 80 | 4 | 47 |" in page
    assert r"![largest angle](largest_angle.png)" in page


def test_killed_in_the_middle_it_goes_on_after_the_last_window(
    launch: Callable, whole: Path, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "calibration"
    line = ["--recipe", recipe, *WINDOWS, "--engine", "fsdp", "--output", folder]
    assert launch(WORKER, "window", *line, ranks=2, check=False).returncode != 0
    assert {path.name for path in folder.iterdir()} == {
        "unfinished.json",
        "window-0000.safetensors",
        "lock",
    }
    first = (folder / "window-0000.safetensors").read_bytes()

    again = launch("launch/calibrate.py", *line, ranks=2)
    assert "going on after window 1 of 2" in again.stdout
    assert (folder / "window-0000.safetensors").read_bytes() == first
    found, wanted = tensors(folder), tensors(whole)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():  # FSDP's and ZeRO-3's hidden states agree to fp32 rounding
        if name.endswith(".spectrum"):
            torch.testing.assert_close(
                found[name], value, rtol=1e-3, atol=1e-5 * value.max().item(), msg=name
            )

    assert "holds it, finished" in launch("launch/calibrate.py", *line, ranks=2).stdout


def test_a_run_takes_it_and_names_what_differs(
    launch: Callable, trained: Callable[..., Path], whole: Path, recipe: Path, tmp_path: Path
) -> None:
    options = [
        "--set",
        f"calibration.path={whole}",
        "--set",
        "train.max_steps=2",
        "--set",
        "eval.suites=[]",
    ]
    done = launch(
        "launch/train.py", "--recipe", recipe, *options, "--output", tmp_path / "run", ranks=2
    )
    assert f"calibration: taken from {whole}" in done.stdout
    own = trained(2)
    for a, b in zip(
        *(sorted((run / "astra_init").rglob("*.safetensors")) for run in (tmp_path / "run", own)),
        strict=True,
    ):
        made, taken = load_file(b), load_file(a)
        assert made.keys() == taken.keys()
        for name, value in made.items():  # to the rounding of sums over two halves of the samples
            torch.testing.assert_close(taken[name], value, rtol=0, atol=1e-5)
    assert (tmp_path / "run" / "calibration" / "spectrum.png").is_file()
    assert not list((tmp_path / "run" / "calibration").glob("window-*"))

    differs = ["--set", f"calibration.path={whole}", "--set", "adapter.eigen_select=largest"]
    refused = launch(
        "launch/train.py",
        "--recipe",
        recipe,
        *differs,
        "--output",
        tmp_path / "x",
        ranks=2,
        check=False,
    )
    assert refused.returncode != 0
    assert "error: adapter.eigen_select: the calibration in" in refused.stderr + refused.stdout


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_ranks_follow_the_effective_ranks_and_reach_the_exported_lora(
    engine: str, trained: Callable[..., Path], base: Path
) -> None:
    settings = (
        "adapter.rank_allocation=effective_rank",
        "train.max_steps=3",
        "eval.suites=[]",
        "adapter.rank=6",
    )
    run = trained(2, *settings, f"engine={engine}")
    modules = json.loads((run / "calibration" / "spectrum.json").read_text())["modules"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "lora")
    ranks = {
        name.removeprefix("base_model.model."): m.r["default"]
        for name, m in model.named_modules()
        if hasattr(m, "r")
    }
    assert sum(ranks.values()) == 2 * 6 * 14  # dW of rank 2 r each
    assert len(set(ranks.values())) > 2
    effective = {name: module["effective_rank"] for name, module in modules.items()}
    assert max(ranks, key=ranks.get) == max(effective, key=effective.get)
    other = trained(1, *settings, "engine=single")
    assert losses(run) == pytest.approx(losses(other), rel=1e-4)


def effective_ranks(
    model: nn.Module, targets: list[str], samples: list[torch.Tensor]
) -> dict[str, float]:
    """exp of the entropy of the eigenvalues' shares, of the second moment of every output, a sample at a time."""
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            keep = outputs.setdefault(name, [])
            module.register_forward_hook(
                lambda _, args, output, keep=keep: keep.append(output[0].double())
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
    settings = ("eval.suites=[]", "engine=single", f"adapter.method={method}")
    run = shutil.copytree(trained(1, *settings), tmp_path / "run")
    launch(
        "launch/calibrate.py",
        "--after",
        run,
        "--engine",
        engine,
        ranks=1 if engine == "single" else 2,
    )
    found = json.loads((run / "after" / "effective_rank.json").read_text())
    assert (run / "after" / "effective_rank.png").read_bytes().startswith(b"\x89PNG")

    of, tokenizer = read(str(recipe), []), AutoTokenizer.from_pretrained(base)
    chosen = [rows[i] for i in choose(len(rows), of.calibration.samples, of.calibration.seed)]
    texts = [f"{prompt(row['query'])}{row['response']}\n" for row in chosen]
    samples = [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in texts]
    if method == "full":
        merged = load_base(run / "model")
    else:
        exported = run / ("adapter" if method == "dora" else "lora")
        merged = PeftModel.from_pretrained(load_base(base), exported).merge_and_unload()
    wanted = {
        when: effective_ranks(model, of.adapter.targets, samples)
        for when, model in (("before", load_base(base)), ("after", merged))
    }
    assert len(found) == 14
    for when, ranks in wanted.items():
        assert {name: module[when] for name, module in found.items()} == pytest.approx(
            ranks, rel=1e-5
        )
    moved = [abs(rank / wanted["before"][name] - 1) for name, rank in wanted["after"].items()]
    assert (
        statistics.median(moved) > 1e-3
    )  # far above what is let pass, so that before does not pass for after


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
