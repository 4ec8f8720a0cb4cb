"""Calibrate on other data than the training rows, in one process and sharded over two ranks.

Proves that rows give the calibration of a recipe that trains on them, bit for bit, and plain text
that of plain PyTorch on its blocks; and that a run refuses a calibration of other data. One launch
for each number of ranks makes all calibrations; about 15 s.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from astra.inits import init_lora_ga
from launch.config.loading import read_recipe
from launch.data.order import sample_examples
from tests.support.paths import WORKERS
from tests.support.plain import load_base
from tests.support.processes import make_set_options
from tests.support.runs import read_calibration, read_results

pytestmark = pytest.mark.xdist_group("calibration_data")

METHODS = {
    "astra": [],
    "corda": ["adapter.method=corda", "adapter.corda_mode=kpm"],
    "eva": ["adapter.method=eva"],
    "lora_ga": ["adapter.method=lora_ga"],
}
RANKS = {1: "single", 2: "zero3"}  # ranks -> engine
LENGTH = 300  # of a block of text: data.max_length of the recipe


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> Path:
    """Write rows of another task, rows.jsonl, and plain text, text.jsonl; their folder."""
    folder = tmp_path_factory.mktemp("other")
    made = [{"ask": row["response"], "say": row["query"]} for row in rows[::-1]]
    texts = [{"words": "" if i % 3 == 0 else 10 * row["response"]} for i, row in enumerate(rows)]
    for name, records in {"rows": made, "text": texts}.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def calibrations(
    launch: Callable, recipe: Path, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Return a folder of calibrations for each number of ranks.

    METHOD-other is on calibration.data, METHOD-hand on training rows that are those rows, and
    METHOD-text on plain text.
    """
    fields = {"path": str(other / "rows.jsonl"), "instruction": "ask", "answer": "say"}
    text = {"path": str(other / "text.jsonl"), "text": "words"}
    folders = {}
    for ranks, engine in RANKS.items():
        cases: dict[str, list[str]] = {}
        for method, settings in METHODS.items():
            common = [f"engine={engine}", *settings]
            cases[f"{method}-other"] = [*common, f"calibration.data={json.dumps(fields)}"]
            by_hand = [f"data.{name}={value}" for name, value in fields.items()]
            cases[f"{method}-hand"] = [*common, *by_hand]
            cases[f"{method}-text"] = [*common, f"calibration.data={json.dumps(text)}"]
        folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        path = folders[ranks] / "cases.json"
        path.write_text(json.dumps(cases))
        launch(WORKERS / "calibration_data.py", recipe, folders[ranks], path, ranks=ranks)
    return folders


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("method", METHODS)
def test_other_rows_give_what_training_rows_would(
    method: str, ranks: int, calibrations: dict[int, Path]
) -> None:
    folder = calibrations[ranks]
    found, wanted = (read_calibration(folder / f"{method}-{kind}") for kind in ("other", "hand"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    manifests = []
    for kind in ("other", "hand"):
        manifests.append(json.loads((folder / f"{method}-{kind}" / "manifest.json").read_text()))
    other, hand = manifests
    assert other["calibration_data"]["instruction"] == "ask"
    assert "calibration_data" not in hand
    assert other["data"] == hand["data"]


def list_blocks(recipe: Path, base: Path, other: Path) -> list[Tensor]:
    """Return the blocks of plain text that are calibrated on, (1, tokens) each."""
    lines = (other / "text.jsonl").read_text().splitlines()
    texts = [json.loads(line)["words"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(base)  # puts nothing before a text
    ids = tokenizer("\n\n".join(text for text in texts if text)).input_ids
    blocks = [ids[i : i + LENGTH] for i in range(0, len(ids), LENGTH)]
    settings = read_recipe(str(recipe), []).calibration
    chosen = sample_examples(len(blocks), settings.samples, settings.seed)
    assert len(chosen) < len(blocks)
    return [torch.tensor([blocks[i]]) for i in chosen]


@pytest.mark.parametrize("ranks", RANKS)
def test_text_gives_what_plain_pytorch_has_on_its_blocks(
    ranks: int, calibrations: dict[int, Path], recipe: Path, base: Path, other: Path
) -> None:
    model, name = load_base(base), "model.layers.1.mlp.down_proj"
    inputs: list[Tensor] = []
    module = model.get_submodule(name)
    module.register_forward_hook(lambda _, args, __: inputs.append(args[0].detach()[0].double()))
    total = count = 0
    for block in list_blocks(recipe, base, other):
        output = model(input_ids=block, labels=block)  # the mean over all but the first token
        total, count = total + output.loss * (block.shape[1] - 1), count + block.shape[1] - 1
    (total / count).backward()
    x = torch.cat(inputs)
    folder = calibrations[ranks]
    assert json.loads((folder / "eva-text" / "manifest.json").read_text())["tokens"] == len(x)

    a0 = read_calibration(folder / "eva-text")[f"{name}.a0"]
    centred = x - x.mean(0)
    vectors = torch.linalg.svd(centred, full_matrices=False)[2][: len(a0)]
    torch.testing.assert_close(
        (a0 @ vectors.T).abs(), torch.eye(len(a0)).double(), rtol=0, atol=1e-4
    )

    found = read_calibration(folder / "lora_ga-text")
    a0, b0 = init_lora_ga(module.weight.grad.double(), len(a0))
    for side, wanted in (("a0", a0), ("b0", b0)):
        value = found[f"{name}.{side}"]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())

    y = x @ module.weight.detach().double().T + module.bias.detach().double()
    spectrum = torch.linalg.eigvalsh(y.T @ y / len(y))
    found = read_calibration(folder / "astra-text")[f"{name}.spectrum"]
    torch.testing.assert_close(found, spectrum, rtol=1e-5, atol=1e-6 * spectrum[-1].item())


def test_a_run_takes_a_calibration_of_its_data_and_no_other(
    launch: Callable, calibrations: dict[int, Path], recipe: Path, other: Path, tmp_path: Path
) -> None:
    fields = {"path": str(other / "rows.jsonl"), "instruction": "ask", "answer": "say"}
    common = ["engine=single", "train.max_steps=1", "eval.suites=[]", "eval.other_text=null"]
    taken = f"calibration.path={calibrations[2] / 'astra-other'}"
    run = tmp_path / "run"
    settings = [*common, taken, f"calibration.data={json.dumps(fields)}"]
    done = launch(
        "launch/train.py", "--recipe", recipe, *make_set_options(settings), "--output", run
    )
    assert f"calibration data: {other}/rows.jsonl, split train: 60 rows" in done.stdout
    assert read_results(run)["calibration_data"]["path"] == str(other / "rows.jsonl")
    assert f"calibration examples of {other}/rows.jsonl" in (run / "README.md").read_text()
    line = ["--recipe", recipe, *make_set_options([*common, taken]), "--output", tmp_path / "own"]
    done = launch("launch/train.py", *line, check=False)
    assert done.returncode == 2
    assert "error: calibration.data: the calibration in " in done.stderr
    assert "here the training rows" in done.stderr


def test_two_calibrations_are_compared_without_training(
    launch: Callable, calibrations: dict[int, Path], tmp_path: Path
) -> None:
    folder = calibrations[1]
    pair = [folder / "astra-other", folder / "astra-text"]
    done = launch("launch/calibrate.py", "--compare", *pair, "--output", tmp_path / "angles")
    found = json.loads((tmp_path / "angles" / "angles.json").read_text())["B0"]
    assert len(found) == 14
    name = "model.layers.1.mlp.down_proj"
    vectors = [read_calibration(path)[f"{name}.vectors"] for path in pair]
    cosines = torch.linalg.svdvals(vectors[0].T @ vectors[1])
    assert found[name]["overlap"] == pytest.approx(cosines.square().mean().item(), rel=1e-9)
    assert "| down_proj (2) | 32 | 4 |" in done.stdout
    # 80 outputs of 33 dimensions that the weight and bias reach: the tail is in the rest.
    assert found["model.layers.0.mlp.gate_proj"]["largest_angle"] < 1e-4
    # Two ranks find what one does.
    pair[0] = calibrations[2] / "astra-text"
    launch("launch/calibrate.py", "--compare", *pair, "--output", tmp_path / "ranks")
    found = json.loads((tmp_path / "ranks" / "angles.json").read_text())["B0"]
    assert max(module["largest_angle"] for module in found.values()) < 0.01
    for line in ([*pair], [*pair, "--engine", "single", "--output", tmp_path / "x"]):
        done = launch("launch/calibrate.py", "--compare", *line, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: --")
