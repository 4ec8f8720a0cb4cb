"""Start commands with wrong input, on one rank and on two.

Proves that every rank ends with exit code 2, that one line names the field, row or file, and that
no rank hangs and none prints a traceback. About 30 s.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.xdist_group("bad_input")


def read_error(done: subprocess.CompletedProcess) -> str:
    """Return the one error line of a command that was refused."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write data files that cannot be used, and a folder with somebody else's file."""
    folder = tmp_path_factory.mktemp("files")
    good = json.dumps({"query": "What is 1 plus 1?", "response": "2"})
    (folder / "gap.jsonl").write_text(f'{good}\n{{"query": "What is 2 plus 2?"}}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(f'{good}\n{{"query": \n')
    (folder / "notes.txt").write_text("hello")
    (folder / "used").mkdir()
    (folder / "used" / "thesis.tex").write_text("mine")
    return folder


# Options of a wrong recipe, and the start of the error line. `None` stands for a good recipe.
WRONG_RECIPES = [
    ("metamth", None, "--recipe: no recipe or file 'metamth'; did you mean metamath?"),
    (None, "adapter.rnk=3", "adapter.rnk: unknown key; did you mean adapter.rank?"),
    (None, "train.lr=fast", "train.lr: 'fast' is not valid"),
    (None, "eval.suites=[gsm9k]", "eval.suites.0: 'gsm9k' is not valid"),
    (None, "train.lr", "--set: 'train.lr' is not of the form a.b=value"),
]


@pytest.mark.parametrize(("name", "setting", "message"), WRONG_RECIPES)
def test_a_wrong_recipe_is_named_at_once(
    name: str | None, setting: str | None, message: str, launch: Callable, recipe: Path
) -> None:
    options = ["--recipe", name or recipe, *(["--set", setting] if setting else [])]
    done = launch("launch/train.py", *options, launcher="python", check=False)
    assert read_error(done).startswith(message)


# What rank 0 alone finds, for which one rank is enough.
WRONG_INPUTS = [
    ("model.name=/no/such/folder", "model.name: no folder /no/such/folder"),
    (
        "model.name=someone/absent",
        "model.name: the hub cannot be reached, and its cache lacks files of someone/absent",
    ),
    (
        "data.path=someone/absent",
        "data.path: the hub cannot be reached, and its cache lacks files of someone/absent",
    ),
    ("data.path={files}/absent.jsonl", "data.path: no file or folder"),
    ("data.path={files}/empty.jsonl", "data.path: {files}/empty.jsonl is empty"),
    ("data.path={files}/broken.jsonl", "data.path: cannot load {files}/broken.jsonl"),
    (
        "data.path={files}/notes.txt",
        "data.path: {files}/notes.txt is none of .json, .jsonl, .parquet",
    ),
    ("data.answer=reponse", "data.answer: no field 'reponse'"),
    ("data.max_length=513", "data.max_length: 513 is above the 512 positions"),
    ("data.max_length=5", "data.max_length: no row has an answer token within it"),
    ("eval.data_dir={files}", "gsm8k: {files} has none of gsm8k_test.jsonl"),
]


@pytest.mark.parametrize(("setting", "message"), WRONG_INPUTS, ids=lambda value: value[:24])
def test_wrong_inputs_are_named(
    setting: str, message: str, launch: Callable, recipe: Path, files: Path, tmp_path: Path
) -> None:
    options = ["--recipe", recipe, "--set", setting.format(files=files)]
    done = launch("launch/train.py", *options, "--output", tmp_path / "run", check=False)
    assert read_error(done).startswith(message.format(files=files))


def test_a_folder_with_other_files_is_not_touched(
    launch: Callable, recipe: Path, files: Path
) -> None:
    done = launch("launch/train.py", "--recipe", recipe, "--output", files / "used", check=False)
    assert read_error(done).startswith("--output:")
    assert [path.name for path in (files / "used").iterdir()] == ["thesis.tex"]


# What rank 0 finds, what every rank finds in the model, and what is found before the process group.
WRONG_ON_TWO_RANKS = [
    (
        "data.path={files}/gap.jsonl",
        "data.path: row 2 of {files}/gap.jsonl: field 'response' is None",
    ),
    (
        "adapter.rank=999",
        "adapter.rank: 999 is above the smaller side, 32, of model.layers.0.self_attn.q_proj",
    ),
    ("calibration.samples=999", "calibration.samples: 999 is above the "),
    ("adapter.targets=[qproj]", "adapter.targets: 'qproj' matches no module"),
    (
        "adapter.eigenselect=largest",
        "adapter.eigenselect: unknown key; did you mean adapter.eigen_select?",
    ),
    ("engine=single", "engine: single trains in one process, not 2"),
    ("train.lr=1e12", "step 3: loss "),
]


@pytest.mark.parametrize(("setting", "message"), WRONG_ON_TWO_RANKS, ids=lambda value: value[:24])
def test_no_rank_hangs_and_rank_0_alone_prints(
    setting: str, message: str, launch: Callable, recipe: Path, files: Path, tmp_path: Path
) -> None:
    options = ["--recipe", recipe, "--set", setting.format(files=files)]
    line = [*options, "--output", tmp_path / "run"]
    launcher = "deepspeed" if setting.endswith("gap.jsonl") else None
    done = launch("launch/train.py", *line, ranks=2, launcher=launcher, check=False)
    assert read_error(done).startswith(message.format(files=files))


def test_commands_import_the_evaluate_library_and_not_launch_evaluate() -> None:
    """Under a launcher launch/ is sys.path[0], where evaluate.py would hide the library."""
    code = """
import runpy, sys
sys.path[0] = sys.argv[1]
runpy.run_path(sys.argv[1] + "/train.py", run_name="started")
import evaluate
print(evaluate.load.__module__)
"""
    line = [sys.executable, "-c", code, str(ROOT / "launch")]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "evaluate.loading"


@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_help_shows_examples(command: str, launch: Callable) -> None:
    done = launch(f"launch/{command}.py", "--help", launcher="python")
    assert "examples:" in done.stdout
    assert f"launch/{command}.py" in done.stdout


@pytest.mark.parametrize("name", ["metamath", "codefeedback", "commonsense"])
def test_run_scripts_pass_launcher_and_arguments_on(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"LAUNCH": sys.executable}
    line = ["bash", str(ROOT / "recipes" / f"{name}.sh"), "--set", "adapter.rnk=1"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert read_error(done).startswith("adapter.rnk: unknown key")
