"""Rows with labels: one text or a pair, tokenised as the tokenizer itself joins a pair.

They are made once, in the cache or in a folder of launch/prepare.py's, as one safetensors file and a
manifest, which ranks map into memory:

    tokens, offsets, labels, token_types    see TokenSet
"""

import contextlib
import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from launch.config.schema import CALIBRATION_TOKENS, Data, Recipe, SourceData
from launch.config.task import Task
from launch.data.labelled.encode import EncodedText, tokenize_blocks, tokenize_texts
from launch.data.labelled.forms import ONE_BEYOND, TaskRow, make_task_form, make_unlabelled_form
from launch.data.manifest import (
    MANIFEST,
    check_refused_rows,
    count_dropped,
    make_once,
    name_row,
    read_json,
    require_same_origin,
)
from launch.data.readers import find_reader
from launch.data.rows import (
    BadRow,
    Row,
    RowForm,
    fetch_source,
    identify_source,
    list_notes,
    load_split,
    make_causal_form,
    select_rows,
    show_rows,
)
from launch.data.token_cache import describe_libraries, find_cache_folder, refuse_other_files
from launch.data.token_set import TokenSet
from launch.models.check import CheckedModel, check_model, make_meta_model, read_config
from launch.models.files import load_tokenizer
from launch.models.head import Head, find_padding
from launch.models.identity import hash_tokenizer
from launch.runtime import watchdog
from launch.runtime.errors import UserError
from launch.runtime.files import hash_file, write_json

FORMAT = 2  # raised with every change of how rows are read, tokenised and stored
ROWS = "rows.safetensors"
DEV = "dev"  # in a prepared folder, with a folder for each set of development rows
# What a killed process may leave in a folder without a manifest.
LEFTOVERS = {"lock", ROWS, f"{ROWS}.tmp", f"{MANIFEST}.tmp", DEV, CALIBRATION_TOKENS}
TRUNCATED = "truncated at max_length"

# Good rows of a chunk -> each example with its tokens. A block of plain text is a row without texts.
EncodeRows = Callable[[Sequence], Iterable[tuple[TaskRow, EncodedText]]]


class RowFolder(NamedTuple):
    """A finished folder of rows with labels, with its manifest."""

    folder: Path
    manifest: dict
    has_classes: bool  # whether labels are places in task.labels; without labels they are NaN
    pad_token: int

    def open_tokens(self) -> TokenSet:
        """Map the rows into memory."""
        tensors = load_file(self.folder / ROWS)
        return TokenSet(
            tokens=tensors["tokens"],
            offsets=tensors["offsets"],
            prompt_lengths=torch.zeros(len(tensors["labels"]), dtype=torch.int64),
            num_truncated=self.manifest["cut"],
            num_dropped=sum(self.manifest["dropped"].values()),
            labels=tensors["labels"].long() if self.has_classes else tensors["labels"],
            token_types=tensors.get("token_types"),
            pad_token=self.pad_token,
        )


class RowBase(NamedTuple):
    """What is read of a base to make rows for a new head on it."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    head: Head
    config: PretrainedConfig  # of the base with the head


def read_base(task: Task, folder: Path) -> RowBase:
    """Read what the rows of a task need of the base in `folder`. Raises UserError."""
    tokenizer = load_tokenizer(folder, needs_end=False)
    head = Head(tuple(task.labels), find_padding(tokenizer, read_config(folder)))
    return RowBase(folder, tokenizer, head, read_config(folder, head=head))


def prepare_rows(
    recipe: Recipe, model_path: Path
) -> tuple[CheckedModel, RowFolder, dict[str, RowFolder]]:
    """Check the base for the task's new head, and prepare the training and development rows.

    Returns:
        The base, the training rows, and name of a score -> development rows.

    Raises:
        UserError: for whatever is wrong with them.
    """
    base = read_base(recipe.task, model_path)
    model = check_model(model_path, head=base.head)
    rows, dev = obtain_all_rows(recipe, base)
    check_all_rows(recipe, rows, dev)
    return model, rows, dev


def obtain_all_rows(
    recipe: Recipe, base: RowBase, output: Path | None = None
) -> tuple[RowFolder, dict[str, RowFolder]]:
    """Find or make the training rows and all development rows, by the name of the score.

    Args:
        output: folder to make them in, in the place of data.prepared or the cache.

    Raises:
        UserError: rows cannot be read.
    """
    rows = obtain_rows(recipe.data, recipe.task, base, output)
    dev = {}
    for name, place in recipe.task.dev_sets.items():
        folder = None if output is None else _name_dev_folder(output, name)
        data = locate_dev(recipe.data, name, place)
        with _naming_dev(place):
            dev[name] = obtain_rows(data, recipe.task, base, folder)
    for found in (rows, *dev.values()):
        check_token_types(found.open_tokens(), base.config)
    return rows, dev


def check_all_rows(recipe: Recipe, rows: RowFolder, dev: Mapping[str, RowFolder]) -> None:
    """Raise UserError if there are rows that the recipe refuses; of development rows, any bad one.

    Args:
        rows, dev: of `obtain_all_rows`.
    """
    check_refused_rows(rows.manifest, recipe.data, TRUNCATED, _find_remedy(rows, recipe.data, None))
    if recipe.task.kind == "regression":
        labels = rows.open_tokens().labels
        if labels.min() == labels.max():  # the hub's test split of STS-B has -1 in every row
            raise UserError(
                f"data.split: the label of every row is {labels[0].item():g}, so there is nothing to "
                "learn; take a split with labels"
            )
    for name, place in recipe.task.dev_sets.items():
        data = locate_dev(recipe.data, name, place)
        remedy = "leave them out by data.filter: a score is of all rows that pass it"
        remedy = _find_remedy(dev[name], data, remedy)
        with _naming_dev(place):
            check_refused_rows(dev[name].manifest, data, TRUNCATED, remedy)


@contextlib.contextmanager
def _naming_dev(place: str) -> Iterator[None]:
    """Let errors about development rows name their place in task.dev."""
    try:
        yield
    except UserError as error:
        raise UserError(f"task.dev: {place}: {error}") from None


def _find_remedy(rows: RowFolder, data: Data, usual: str | None) -> str | None:
    """Return what helps against bad rows: where labels may count from 1, not to leave rows out."""
    if data.on_bad_row == "refuse" and ONE_BEYOND in rows.manifest["dropped"]:
        return "give task.labels as the numbers that the rows have"
    return usual


def _name_dev_folder(folder: Path, name: str) -> Path:
    """Return where a prepared folder has the development rows of a score."""
    return folder / DEV / quote(name, safe="")


def locate_dev(data: Data, name: str, place: str) -> Data:
    """Return where development rows are: a file, a folder with a separator in its path, or a split.

    A score is to be of all rows that pass data.filter, so none of them is dropped.
    """
    update = {"limit": None, "on_cut": "keep", "on_bad_row": "refuse"}
    # A folder without a separator in its name could be a split too: `validation`, after a split was saved.
    path = Path(place).expanduser()
    is_path = path.is_file() or (os.sep in place and path.exists())
    if data.prepared is not None:
        folder = _name_dev_folder(Path(data.prepared).expanduser(), name)
        update["prepared"] = str(folder)
        if (folder / MANIFEST).is_file():  # the file itself need not be on this machine
            is_path = read_json(folder / MANIFEST)["made_from"]["data"]["path"] == place
    is_named_as_path = os.sep in place or find_reader(path) is not None
    if is_named_as_path and not is_path and not path.exists():
        raise UserError(f"task.dev: {name}: there is no file or folder {place}; correct the path")
    if is_path:
        update |= {"path": place, "split": "train", "config": None}
    else:
        update["split"] = place
    return data.model_copy(update=update)


def check_token_types(tokens: TokenSet, config: PretrainedConfig) -> None:
    """Raise UserError if the base has no embedding for a text's number in its pair."""
    num_types = getattr(config, "type_vocab_size", 0)
    if tokens.token_types is None or not num_types:
        return
    largest = int(tokens.token_types.max())
    if largest >= num_types:
        raise UserError(
            f"model.name: the tokenizer numbers the texts of a pair up to {largest}, and the base "
            f"has {num_types} token types; take token_type_ids out of the tokenizer's "
            "model_input_names"
        )


def describe_dev(dev: dict[str, RowFolder]) -> dict:
    """Describe development rows as results.json has them; nothing where there are none."""
    described = {}
    for name, rows in dev.items():
        described[name] = {key: rows.manifest[key] for key in ("kept", "cut", "tokens_sha256")}
    return {"dev": described} if described else {}


def obtain_rows(
    data: Data,
    task: Task,
    base: RowBase,
    output: Path | None = None,
) -> RowFolder:
    """Find the rows of `data` in data.prepared, or in the cache, where they are made if needed.

    Args:
        output: folder to make them in, in the place of both.

    Raises:
        UserError: rows cannot be read, or a folder holds others.
    """
    has_types = _takes_token_types(base)
    described = task.model_dump(include={"kind", "labels", "sentence1", "sentence2", "label"})
    encode = _make_row_encoder(base.tokenizer, data.max_length, has_types)
    reading = RowReading(make_task_form(task, data), encode, has_types, described)
    return _find_or_make(data, reading, base, output)


def obtain_unlabelled_rows(data: SourceData, base: RowBase, output: Path | None) -> RowFolder:
    """Find or make rows to calibrate on, as `obtain_rows` does: texts, pairs or plain text."""
    has_types = _takes_token_types(base)
    encode = _make_row_encoder(base.tokenizer, data.max_length, has_types)

    def encode_blocks(rows: Sequence[Row]) -> Iterable[tuple[TaskRow, EncodedText]]:
        texts = [row.instruction for row in rows]
        blocks = tokenize_blocks(base.tokenizer, texts, data.max_length, has_types)
        return [(TaskRow(0, (), label=None), block) for block in blocks]

    if data.text is not None:
        reading = RowReading(make_causal_form(data), encode_blocks, has_types, {})
    else:
        form = make_unlabelled_form(data, data.sentence1, data.sentence2)
        reading = RowReading(form, encode, has_types, {})
    return _find_or_make(data, reading, base, output)


def _make_row_encoder(
    tokenizer: PreTrainedTokenizerBase, max_length: int, has_types: bool
) -> EncodeRows:
    """Make the function that tokenises rows with one text or two."""

    def encode(rows: Sequence[TaskRow]) -> Iterable[tuple[TaskRow, EncodedText]]:
        texts = [row.texts for row in rows]
        return zip(rows, tokenize_texts(tokenizer, texts, max_length, has_types), strict=True)

    return encode


class RowReading(NamedTuple):
    """How rows are read and tokenised."""

    form: RowForm
    encode: EncodeRows
    has_types: bool  # whether the tokens of a pair are told apart
    task: dict  # fields of the task that decide labels and texts; empty without labels


def _find_or_make(data: Data, reading: RowReading, base: RowBase, output: Path | None) -> RowFolder:
    """Find or make the rows of `data`; see `obtain_rows`."""
    origin = {
        "format": FORMAT,
        "data": data.token_fields(),
        "task": reading.task,
        "token_types": reading.has_types,
        "tokenizer": hash_tokenizer(base.folder, with_config=True),
        "libraries": describe_libraries(),
    }
    option = "row cache" if output is None else "--output"
    if output is None and data.prepared is not None:
        folder, option = Path(data.prepared).expanduser(), "data.prepared"
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{option}: {folder} is not there or has no {MANIFEST}; prepare these rows with "
                "launch/prepare.py"
            )
    else:
        source = fetch_source(data)
        origin["source"] = identify_source(data, source)
        folder = output or find_cache_folder("rows", origin)

        def write() -> None:
            refuse_other_files(folder, LEFTOVERS, option)
            _write_rows(folder, origin, data, reading, source)

        make_once(folder, write)
    manifest = read_json(folder / MANIFEST)
    require_same_origin(folder, manifest, origin, option)
    if not (folder / ROWS).is_file() or hash_file(folder / ROWS) != manifest["tokens_sha256"]:
        raise UserError(f"{folder / ROWS}: damaged; delete {folder}, and start again")
    has_classes = bool(reading.task.get("labels"))
    return RowFolder(folder, manifest, has_classes, base.head.pad_token)


def _takes_token_types(base: RowBase) -> bool:
    """Return whether the tokenizer tells a pair's texts apart, and the model takes that in."""
    forward = type(make_meta_model(base.config)).forward
    accepted = "token_type_ids" in inspect.signature(forward).parameters
    return accepted and "token_type_ids" in base.tokenizer.model_input_names


def _write_rows(
    folder: Path,
    origin: dict,
    data: Data,
    reading: RowReading,
    source: Path,
) -> None:
    """Read, check and tokenise all rows, and write them and their manifest."""
    split = load_split(data, source, reading.form)
    tally = {"made_from": origin, "read": 0, "selected": 0, "kept": 0, "cut": 0}
    tally |= {"dropped": {}, "examples": {}}
    parts: list[dict[str, Tensor]] = []
    with show_rows(split, data, "tokenise") as advance:
        for chunk in select_rows(split, data, form=reading.form):
            watchdog.heartbeat()
            encoded = reading.encode(chunk.rows)
            parts.append(_keep_rows(encoded, chunk.bad, data, reading.has_types, tally))
            tally |= {"read": chunk.position, "selected": chunk.selected}
            advance(chunk)
    if not tally["kept"]:
        named = [rows[0] for rows in tally["examples"].values()]
        reason = f"row {min(named)[0]}: {min(named)[1]}" if named else "there are no rows"
        raise UserError(f"data.path: nothing to use in {data.path}: {reason}")
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    lengths = tensors.pop("lengths")
    tensors["offsets"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    aside = folder / f"{ROWS}.tmp"
    save_file(tensors, aside)
    shutil.move(aside, folder / ROWS)
    notes = list_notes(split, data)
    if ONE_BEYOND in tally["dropped"]:
        notes.append(
            f"task.labels: {tally['dropped'][ONE_BEYOND]} rows have a label one beyond the places "
            "(do the rows count from 1?)"
        )
    tally |= {"tokens": len(tensors["tokens"]), "notes": notes}
    write_json(folder / MANIFEST, tally | {"tokens_sha256": hash_file(folder / ROWS)})


def _keep_rows(
    encoded: Iterable[tuple[TaskRow, EncodedText]],
    bad: Sequence[BadRow],
    data: Data,
    has_types: bool,
    tally: dict,
) -> dict[str, Tensor]:
    """Return the tensors of a chunk, and add what is kept, cut and dropped to `tally`."""
    ids: list[int] = []
    types: list[int] = []
    lengths: list[int] = []
    labels: list[float] = []
    dropped = list(bad)
    for row, text in encoded:
        if text.whole_length > data.max_length:
            what = f"its {text.whole_length} tokens are truncated to {data.max_length}"
            cut = BadRow(row.number, TRUNCATED, what)
            if data.on_cut == "drop":
                dropped.append(cut)
                continue
            tally["cut"] += 1
            name_row(tally, cut)
        ids += text.ids
        types += text.types or []
        lengths.append(len(text.ids))
        labels.append(math.nan if row.label is None else row.label)
    tally["kept"] += len(labels)
    count_dropped(tally, dropped)
    tensors = {
        "tokens": torch.tensor(ids, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.float64),
    }
    return tensors | ({"token_types": torch.tensor(types, dtype=torch.int8)} if has_types else {})
