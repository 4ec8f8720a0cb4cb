"""Train architectures of other kinds under every engine, or see them refused by one line.

Tiny random models. Proves that the first loss is that of plain transformers, and that what a
finished run exports loads in plain PEFT or transformers with the logits of the trained model. One
launch an engine runs all cells (workers/architectures.py). About 5 minutes on 2 cores; the table of
docs/engines-and-memory.md is this matrix.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoTokenizer

from launch.config.loading import read_recipe
from tests.support.architectures import CELL_SETTINGS, CONFIGS, METHODS, make_model
from tests.support.paths import WORKERS
from tests.support.plain import load_base, train_plainly
from tests.support.runs import read_losses, read_results

pytestmark = [pytest.mark.xdist_group("architectures"), pytest.mark.full]

ENGINES = {"single": 1, "zero3": 2, "fsdp": 2}
# (architecture, method) -> how the line begins that refuses it, on every engine.
REFUSED = {
    ("gpt2", "astra"): "adapter.targets: ",  # its layers are Conv1D, not nn.Linear
}


@pytest.fixture(scope="module")
def bases(base: Path, rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save every model with the tokenizer of `base`; the folder of their folders."""
    folder = tmp_path_factory.mktemp("bases")
    ids = AutoTokenizer.from_pretrained(base)([rows[0]["query"]]).input_ids
    for name in CONFIGS:
        make_model(name).save_pretrained(folder / name)
        for path in base.glob("tokenizer*"):
            shutil.copy(path, folder / name)
        (folder / name / "ids.json").write_text(json.dumps(ids))
    return folder


@pytest.fixture(scope="module")
def run_matrix(
    launch: Callable, recipe: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Run all cells of an engine, once, and return the folder of their runs."""
    folders: dict[str, Path] = {}

    def run(engine: str) -> Path:
        if engine not in folders:
            folder = tmp_path_factory.mktemp(engine)
            arguments = (recipe, bases, folder, engine)
            launch(WORKERS / "architectures.py", *arguments, ranks=ENGINES[engine])
            folders[engine] = folder
        return folders[engine]

    return run


@pytest.fixture(scope="module")
def first_losses(bases: Path, recipe: Path, rows: list[dict]) -> dict[str, float]:
    """Return the first loss of each model in plain transformers."""
    losses = {}
    for name in CONFIGS:
        settings = [*CELL_SETTINGS, "train.max_steps=1", f"model.name={bases / name}"]
        settings.append("train.warmup_ratio=0")
        losses[name] = train_plainly(load_base(bases / name), read_recipe(recipe, settings), rows)
    return {name: found[0] for name, (found, _) in losses.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cell_trains_as_plain_transformers_or_is_refused(
    name: str,
    engine: str,
    method: str,
    run_matrix: Callable[[str], Path],
    bases: Path,
    first_losses: dict[str, float],
) -> None:
    run = run_matrix(engine) / name / method
    cell = json.loads((run / "cell.json").read_text())
    assert cell["fault"] is None, cell["fault"]
    line = cell["line"]
    if (name, method) in REFUSED:
        assert line is not None and line.startswith(REFUSED[name, method])
        return
    assert line is None
    losses = read_losses(run)
    # 1e-4: for fp32 and other orders of its sums.
    assert losses[0] == pytest.approx(first_losses[name], rel=1e-4)
    assert len(losses) == read_results(run)["steps"] == 3
    if method == "full":
        model = load_base(run / "model")
        assert list_weights(run / "model") == list_weights(bases / name)
    else:
        model = PeftModel.from_pretrained(load_base(bases / name), run / "lora")
    ids = torch.tensor(json.loads((bases / name / "ids.json").read_text()))
    trained = torch.load(run / "logits.pt", weights_only=True)
    with torch.no_grad():
        reached = model.eval()(input_ids=ids).logits
        before = load_base(bases / name)(input_ids=ids).logits
    moved = (trained - before).abs().max()
    assert moved > 1e-3
    assert (reached - trained).abs().max() < 1e-2 * moved


def list_weights(folder: Path) -> set[str]:
    """Return the names of the weights in a model's folder."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names
