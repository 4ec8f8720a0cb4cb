"""Proves that calibration.data is read as training rows are, and plain text in blocks.

Needs nothing; takes 3 seconds.
"""

import itertools
import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from launch.config.loading import dump_recipe, read_recipe
from launch.config.schema import Recipe
from launch.data.calibration_tokens import obtain_calibration_tokens
from launch.data.preparation import prepare_tokens
from launch.data.token_cache import obtain_tokens
from launch.data.token_set import TokenSet
from launch.models import files as model_files
from launch.runtime.errors import UserError
from tests.support.rows import make_byte_tokenizer

TEXTS = ["", " \n", "one line", "é and </s>", "", "a longer line " * 5, "end"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of one token a byte, which begins a text with `<bos>`."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 400}'
    )
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_recipe(folder: Path, model: Path, *overrides: str, length: int = 200) -> Recipe:
    rows = [{"query": f"q{i}", "response": f"a{i}"} for i in range(5)]
    write(folder / "train.jsonl", rows)
    others = [{"ask": f"other {i}", "say": f"answer {i}"} for i in range(4)]
    write(folder / "others.jsonl", others)
    write(folder / "text.jsonl", [{"words": text} for text in TEXTS])
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name: {model}}}\ndata: {{path: {folder}/train.jsonl, max_length: {length}}}\n"
    )
    return read_recipe(str(path), list(overrides))


def rows_of(folder: Path) -> str:
    return f"calibration.data={{path: {folder}/others.jsonl, instruction: ask, answer: say}}"


def text_of(folder: Path) -> str:
    return f"calibration.data={{path: {folder}/text.jsonl, text: words}}"


def as_lists(tokens: TokenSet) -> list[list[int]]:
    bounds = tokens.offsets.tolist()
    return [tokens.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def test_rows_are_those_that_would_be_trained_on(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model, rows_of(tmp_path))
    names = ["instruction=ask", "answer=say", f"path={tmp_path}/others.jsonl"]
    trained = make_recipe(tmp_path, model, *(f"data.{name}" for name in names))
    found = obtain_calibration_tokens(recipe.calibration_source, model)
    assert obtain_tokens(trained.data, model).folder == found.folder  # one cache for both
    assert found.folder != obtain_tokens(recipe.data, model).folder
    assert len(found.open_tokens()) == 4


@pytest.mark.parametrize("length", [2, 7, 20, 4000])
def test_text_is_joined_and_cut_into_blocks_that_begin_as_texts_do(
    length: int, tmp_path: Path, model: Path
) -> None:
    recipe = make_recipe(tmp_path, model, text_of(tmp_path), length=length)
    tokens = obtain_calibration_tokens(recipe.calibration_source, model).open_tokens()
    blocks = as_lists(tokens)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n\n".join(text for text in TEXTS if text.strip())
    begin, *ids = tokenizer(text, split_special_tokens=True).input_ids
    assert begin == tokenizer.bos_token_id
    step = length - 1
    assert blocks == [[begin, *ids[i : i + step]] for i in range(0, len(ids), step)]
    assert tokens.prompt_lengths.tolist() == [1] * len(blocks)  # all but the first are predicted
    assert tokenizer.decode([i for block in blocks for i in block[1:]]) == text


def test_prepared_tokens_hold_them_too(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model, text_of(tmp_path))
    folder = tmp_path / "prepared"
    prepare_tokens(recipe, folder, [])
    assert "blocks of text" in (folder / "calibration" / "report.md").read_text()
    prepared = make_recipe(tmp_path, model, text_of(tmp_path), f"data.prepared={folder}")
    for name in ("train", "text"):
        (tmp_path / f"{name}.jsonl").unlink()
    found = obtain_calibration_tokens(prepared.calibration_source, model)
    assert found.folder == folder / "calibration"
    assert len(obtain_tokens(prepared.data, model).open_tokens()) == 5
    others = make_recipe(tmp_path, model, rows_of(tmp_path), f"data.prepared={folder}")
    with pytest.raises(UserError, match=r"^data\.prepared: .*calibration was made with another"):
        obtain_calibration_tokens(others.calibration_source, model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{path: FOLDER/nowhere.jsonl}", r"calibration\.data\.path: no file or folder"),
        ("{path: FOLDER/others.jsonl}", r"calibration\.data\.instruction: no field 'query'"),
        ("{path: FOLDER/text.jsonl, text: wrds}", r"calibration\.data\.text: .*did you mean words"),
        ("{path: FOLDER/blank.jsonl, text: words}", r"calibration\.data\.path: .* are blank"),
        ("{path: FOLDER/bad.jsonl, text: words}", r"calibration\.data\.path: row 2 .*not text"),
        ("{path: FOLDER/others.jsonl, split: dev}", r"calibration\.data\.path: .*split"),
    ],
)
def test_errors_name_the_fields_of_calibration_data(
    data: str, message: str, tmp_path: Path, model: Path
) -> None:
    write(tmp_path / "blank.jsonl", [{"words": " "}, {"words": "\n"}])
    write(tmp_path / "bad.jsonl", [{"words": "good"}, {"words": 7}])
    override = f"calibration.data={data}".replace("FOLDER", str(tmp_path))
    recipe = make_recipe(tmp_path, model, override)
    with pytest.raises(UserError, match=rf"^{message}"):
        obtain_calibration_tokens(recipe.calibration_source, model)


def test_a_path_that_is_nearly_a_short_name_says_so(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no such data set")

    monkeypatch.setattr(model_files, "snapshot_download", refuse)
    recipe = make_recipe(tmp_path, model, "calibration.data=wikitext3")
    message = r"^calibration\.data\.path: cannot get wikitext3 .*; did you mean wikitext2\?$"
    with pytest.raises(UserError, match=message):
        obtain_calibration_tokens(recipe.calibration_source, model)


@pytest.mark.parametrize(
    ("name", "path", "fields"),
    [
        ("wikitext2", "Salesforce/wikitext", {"config": "wikitext-2-raw-v1", "text": "text"}),
        ("nq_open", "google-research-datasets/nq_open", {"text": "question"}),
        ("alpaca", "yahma/alpaca-cleaned", {"input": "input", "answer": "output"}),
        ("metamath", "meta-math/MetaMathQA", {"instruction": "query", "answer": "response"}),
        (
            "codefeedback",
            "m-a-p/CodeFeedback-Filtered-Instruction",
            {"filter": {"lang": "python"}, "answer": "answer"},
        ),
        ("commonsense", "zwhe99/commonsense_170k", {"instruction": "instruction"}),
    ],
)
def test_short_names_mean_data_sets_with_their_fields(
    name: str, path: str, fields: dict, tmp_path: Path
) -> None:
    for overrides in (
        [f"calibration.data={name}"],
        [f"calibration.data.path={name}", "calibration.data.limit=9"],
    ):
        recipe = read_recipe("metamath", overrides)
        data = recipe.calibration.data
        assert data.path == path
        assert {field: getattr(data, field) for field in fields} == fields
        copy = tmp_path / "recipe.yaml"
        copy.write_text(dump_recipe(recipe))
        assert read_recipe(str(copy), []) == recipe
    assert data.limit == 9
    # A set of the recipes has the fields that the recipe gives to it.
    if name in ("metamath", "codefeedback", "commonsense"):
        own = read_recipe(name, []).data
        for field in ("path", "instruction", "answer", "input", "filter"):
            assert getattr(data, field) == getattr(own, field)
    assert read_recipe("metamath", [f"calibration.data=./{name}"]).calibration.data.path != path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["calibration.data={path: f, text: t, answer: a}"], "calibration.data.answer: plain text"),
        (
            ["adapter.method=lora", "calibration.data=alpaca"],
            "calibration.data: lora runs no examples",
        ),
        (
            ["adapter.eigen_select=haar", "calibration.data=alpaca"],
            "calibration.data: astra haar runs no examples",
        ),
        (
            ["calibration.statistics=reference", "calibration.data=alpaca"],
            "calibration.data: the reference statistics",
        ),
        (["calibration.data={pth: f}"], "calibration.data.path: is required|calibration.data.pth"),
        (["calibration.data=3"], "calibration.data: 3 is not valid"),
    ],
)
def test_what_means_nothing_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^({message})"):
        read_recipe("metamath", settings)
