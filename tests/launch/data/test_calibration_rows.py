"""calibration.data of tasks with a head: other rows, or plain text, as the base takes them. 4 s."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from launch.config.schema import Recipe
from launch.data.calibration_tokens import obtain_calibration_rows
from launch.data.preparation import prepare_tokens
from launch.runtime.errors import UserError
from tests.support.classifiers import (
    MAX_LENGTH,
    TARGETS,
    load_recipe,
    make_recipe,
    make_rows,
    write_rows,
)

TEXTS = ["w1 w2 w3 w4 w5", "", "  ", "w6 [SEP] w7", *["w8 w9 w10 w11"] * 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of each kind of base, with rows without labels and with plain text."""
    made = {}
    for kind in TARGETS:
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        make_recipe(folder, kind)
        others = make_rows(15, 7)
        unlabelled = [{"first": row["left"], "second": row["right"]} for row in others]
        write_rows(folder / "others.jsonl", unlabelled)
        write_rows(folder / "text.jsonl", [{"text": text} for text in TEXTS])
    return made


def load(folder: Path, data: str, *settings: str) -> Recipe:
    """Load the recipe in `folder` with the fields `data` of calibration.data."""
    return load_recipe(folder / "recipe.yaml", f"calibration.data={{{data}}}", *settings)


def read_examples(recipe: Recipe, folder: Path) -> list[list[int]]:
    """Return the tokens of each example, and check that there are no labels."""
    tokens = obtain_calibration_rows(recipe, folder / "base").open_tokens()
    assert tokens.labels.isnan().all()  # a loss of them would be refused
    bounds = itertools.pairwise(tokens.offsets.tolist())
    return [tokens.tokens[a:b].tolist() for a, b in bounds]


@pytest.mark.parametrize("kind", TARGETS)
def test_rows_are_those_of_the_tokenizer(kind: str, folders: dict[str, Path]) -> None:
    folder = folders[kind]
    tokenizer, rows = AutoTokenizer.from_pretrained(folder / "base"), make_rows(15, 7)
    options = {"truncation": "longest_first", "max_length": MAX_LENGTH}
    path = f"path: {folder}/others.jsonl"
    pairs = read_examples(load(folder, f"{path}, sentence1: first, sentence2: second"), folder)
    assert pairs == [tokenizer(row["left"], row["right"], **options).input_ids for row in rows]
    single = read_examples(load(folder, f"{path}, sentence1: first"), folder)
    assert single == [tokenizer(row["left"], **options).input_ids for row in rows]
    # Without fields they are the task's own; what is no label of the task does not matter.
    own = read_examples(load(folder, f"path: {folder}/dev.jsonl", "task.labels=[x, y]"), folder)
    dev = make_rows(21, 2)
    assert own == [tokenizer(row["left"], row["right"], **options).input_ids for row in dev]


@pytest.mark.parametrize("kind", TARGETS)
def test_text_is_joined_and_cut_into_blocks_with_special_tokens(
    kind: str, folders: dict[str, Path]
) -> None:
    folder = folders[kind]
    recipe = load(folder, f"path: {folder}/text.jsonl, text: text")
    blocks = read_examples(recipe, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    text = "\n\n".join(text for text in TEXTS if text.strip())
    whole = tokenizer(text, split_special_tokens=True).input_ids
    begin, end = whole[:1], [] if kind == "llama" else whole[-1:]
    inner = [block[1 : len(block) - len(end)] for block in blocks]
    assert all(block[:1] == begin and block[len(block) - len(end) :] == end for block in blocks)
    assert [len(block) for block in blocks[:-1]] == [MAX_LENGTH] * (len(blocks) - 1)
    assert begin + [token for block in inner for token in block] + end == whole
    assert len(blocks) > 2


def test_prepared_rows_hold_them_too(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, prepared = folders["bert"], tmp_path / "prepared"
    data = f"path: {folder}/text.jsonl, text: text"
    prepare_tokens(load(folder, data), prepared, [])
    report = (prepared / "report.md").read_text()
    assert re.search(r"To calibrate on:\n\n# Tokens of .*text\.jsonl\n", report)
    assert " blocks of text |" in report.partition("To calibrate on:")[2]
    recipe = load(folder, data, f"data.prepared={prepared}")
    found = obtain_calibration_rows(recipe, folder / "base")
    assert found.folder == prepared / "calibration"
    cached = obtain_calibration_rows(load(folder, data), folder / "base")
    assert torch.equal(found.open_tokens().tokens, cached.open_tokens().tokens)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("path: FOLDER/none.jsonl", [], r"calibration\.data\.path: no file or folder"),
        ("path: FOLDER/text.jsonl", [], r"calibration\.data\.sentence1: no field 'left'.*text"),
        (
            "path: FOLDER/others.jsonl, sentence1: frst",
            [],
            r"calibration\.data\.sentence1: .*did you mean first",
        ),
        ("path: FOLDER/text.jsonl, sentence1: text", [], r"calibration\.data\.path: row 2 .*empty"),
        ("path: FOLDER/text.jsonl, text: text", ["data.max_length=2"], r"data\.max_length: 2 has"),
        ("path: p, sentence2: b", [], r"calibration\.data\.sentence2: .*sentence1"),
        ("path: p, sentence1: a, text: b", [], r"calibration\.data\.text: .*leave one out"),
        ("path: p, instruction: a", [], r"calibration\.data\.instruction: .*classification"),
        ("path: alpaca", [], r"calibration\.data\.instruction|calibration\.data\.input"),
        ("path: p", ["adapter.method=lora_ga"], r"calibration\.data: lora_ga .*own loss"),
        ("path: p", ["adapter.method=lora"], r"calibration\.data: lora runs no examples"),
    ],
)
def test_errors_name_the_fields_of_calibration_data(
    data: str, settings: list[str], message: str, folders: dict[str, Path]
) -> None:
    folder = folders["bert"]
    with pytest.raises(UserError, match=rf"^{message}"):
        recipe = load(folder, data.replace("FOLDER", str(folder)), *settings)
        obtain_calibration_rows(recipe, folder / "base")
