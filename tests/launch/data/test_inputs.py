"""Nodes that hold other content under the same names are refused; what is unusual is said at every start.

The nodes are simulated: what each would have found stands in for its work. 3 s.
"""

import copy
from pathlib import Path

import pytest
import torch

from launch.config.loading import read_recipe
from launch.config.schema import Recipe
from launch.data import inputs
from launch.data.preparation import prepare_tokens
from launch.runtime.errors import UserError
from tests.support.classifiers import load_recipe, make_base, make_recipe, make_rows, write_rows
from tests.support.rows import write_lines

NODE = {
    "host": "one",
    "data": {"tokens_sha256": "t", "dev": {"mrpc": {"kept": 9, "cut": 0, "tokens_sha256": "d"}}},
    "calibration_data": {"tokens_sha256": "c"},
    "base": {"weights_sha256": "w", "config_sha256": "x"},
}


@pytest.mark.parametrize(
    ("place", "field"),
    [
        (("data", "tokens_sha256"), "data.path"),
        (("data", "dev", "mrpc", "tokens_sha256"), "task.dev"),
        (("calibration_data", "tokens_sha256"), "calibration.data.path"),
        (("base", "weights_sha256"), "model.name"),
        (("base", "config_sha256"), "model.name"),
    ],
)
def test_nodes_with_other_content_are_refused(
    place: tuple[str, ...], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.deepcopy(NODE) | {"host": "two"}
    inner = other
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "changed"
    monkeypatch.setattr(inputs, "run_on_each_node", lambda _: [NODE, other])
    with pytest.raises(UserError, match=rf"^{field}: its content on two is not one's; copy it$"):
        inputs.prepare_inputs(read_recipe("metamath", []), torch.device("cpu"))


def prepare(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[inputs.Inputs, list[str]]:
    """Prepare the inputs on one rank; return them and the lines that it prints."""
    monkeypatch.setattr(inputs, "run_on_each_node", lambda work: [work()])
    monkeypatch.setattr(inputs.dist, "get_rank", lambda: 0)
    capsys.readouterr()
    found = inputs.prepare_inputs(recipe, torch.device("cpu"))
    return found, capsys.readouterr().out.splitlines()


def test_notes_on_rows_are_printed_at_every_start_under_their_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))
    path = write_lines(
        tmp_path / "rows.jsonl", [{"query": "w1", "response": "w2", "input": "w3"}] * 3
    )
    base = make_base(tmp_path / "base", "llama")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {base}}}\ndata: {{path: {path}, max_length: 32}}\n"
    )

    def read(*settings: str) -> list[str]:
        recipe = read_recipe(str(tmp_path / "recipe.yaml"), list(settings))
        return prepare(recipe, monkeypatch, capsys)[1]

    told = f": 3 of 3 rows of {path} have a field 'input', which is not read; set "
    said = [f"data.input{told}data.input=input"]
    assert read() == said
    assert read() == said  # from the cache
    source = "calibration.data.input"
    assert read(f"calibration.data.path={path}") == [*said, f"{source}{told}{source}=input"]
    source = "data.sources.a.input"
    mix = ["data.path=null", f"data.sources={{a: {{path: {path}, weight: 1}}}}"]
    assert read(*mix) == read(*mix) == [f"{source}{told}{source}=input"]
    # As they stand in the reports of launch/prepare.py.
    prepare_tokens(read_recipe(str(tmp_path / "recipe.yaml"), mix), tmp_path / "mix", [])
    assert f"\n{source}{told}{source}=input.\n" in (tmp_path / "mix" / "report.md").read_text()
    settings = [f"calibration.data.path={path}"]
    prepare_tokens(read_recipe(str(tmp_path / "recipe.yaml"), settings), tmp_path / "made", [])
    assert f"\ndata.input{told}data.input" in (tmp_path / "made" / "report.md").read_text()
    source, report = "calibration.data.input", tmp_path / "made" / "calibration" / "report.md"
    assert f"\n{source}{told}{source}=input.\n" in report.read_text()


def test_a_tokenizer_that_runs_pairs_together_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))
    told = "this tokenizer puts no token between the texts of a pair"
    for kind, settings, said in (
        ("llama", (), True),
        ("llama", (), True),  # from the cache
        ("llama", ("task.sentence2=null",), False),
        ("bert", (), False),
        ("roberta", (), False),
    ):
        recipe = load_recipe(make_recipe(tmp_path / kind, kind), *settings)
        lines = prepare(recipe, monkeypatch, capsys)[1]
        assert any(told in line for line in lines) == said


def test_an_unofficial_number_of_rows_is_said_from_the_cache_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))
    glue = tmp_path / "RTE"
    glue.mkdir()
    lines = ["index\tsentence1\tsentence2\tlabel", "0\tw1\tw2\tentailment"]
    (glue / "train.tsv").write_text("\n".join([*lines, "1\tw1\tw3\tnot_entailment"]) + "\n")
    settings = [f"data.path={glue}", "data.config=rte", "task.labels=[entailment, not_entailment]"]
    settings += ["task.sentence1=sentence1", "task.sentence2=sentence2", "task.dev=null"]
    path = make_recipe(tmp_path / "bert", "bert")
    recipe = load_recipe(path, *settings)
    said = [f"data.path: {glue}: split train of rte has 2 rows; GLUE's has 2490"]
    assert prepare(recipe, monkeypatch, capsys)[1] == said
    assert prepare(recipe, monkeypatch, capsys)[1] == said
    calibrating = [f"calibration.data.path={glue}", "calibration.data.config=rte"]
    prepare_tokens(load_recipe(path, *settings, *calibrating), tmp_path / "made", [])
    report = (tmp_path / "made" / "report.md").read_text()
    assert [line[:-1] for line in report.splitlines() if "GLUE's has" in line] == [
        *said,
        f"calibration.{said[0]}",
    ]


def test_rows_that_are_kept_apart_and_used_too_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))
    path = make_recipe(tmp_path / "bert", "bert")
    rows = make_rows(20, 1)
    train = write_rows(tmp_path / "bert" / "train.jsonl", [*rows[:18], rows[0], rows[19]])
    write_rows(tmp_path / "bert" / "dev.jsonl", [rows[3], rows[4], rows[17], rows[19]])
    settings = [
        "data.held_out=2",
        f"task.dev={{own: {tmp_path}/bert/dev.jsonl, part: 'train[50%:]'}}",
    ]
    calibrating = f"calibration.data.path={train}"
    data = prepare(load_recipe(path, *settings, calibrating), monkeypatch, capsys)[0].data
    # Rows 0 and 19 are held out, and row 0 is trained on too; `part` holds rows 10 to 17, 0 and 19.
    assert data["held_out_trained"] == 1
    assert data["held_out_calibrated"] == 2
    assert data["dev"]["own"]["trained"] == 3
    assert data["dev"]["part"]["trained"] == 9
    data = prepare(load_recipe(path, *settings), monkeypatch, capsys)[0].data
    assert "held_out_calibrated" not in data
    text = write_lines(tmp_path / "text.jsonl", [{"text": "w1 w2"}] * 3)
    blocks = f"calibration.data={{path: {text}, text: text}}"
    data = prepare(load_recipe(path, *settings, blocks), monkeypatch, capsys)[0].data
    assert data["held_out_trained"] == 1
    assert "held_out_calibrated" not in data  # no row is a block of text
