"""Rows with labels: one text or a pair, tokenised as the tokenizer itself joins a pair.

They are made once, in the cache or in a folder of launch/prepare.py's, as one safetensors file and a
manifest, which ranks map into memory:

    tokens, offsets, labels, token_types    see TokenSet
"""

import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizer, PreTrainedTokenizerBase

from launch.config.schema import CALIBRATION_TOKENS, Data, Recipe
from launch.config.task import Task
from launch.data.sources import (
    EMPTY,
    BadRow,
    RowForm,
    fetch_source,
    find_text_fault,
    identify_source,
    load_split,
    select_rows,
    show_rows,
    show_value,
)
from launch.data.token_cache import (
    MANIFEST,
    check_refused_rows,
    count_dropped,
    name_row,
    read_json,
    require_same_origin,
)
from launch.data.token_set import TokenSet
from launch.models.check import CheckedModel, check_model, make_meta_model, read_config
from launch.models.files import hash_tokenizer, load_tokenizer
from launch.models.head import Head, find_padding
from launch.runtime import watchdog
from launch.runtime.errors import UserError
from launch.runtime.files import cache_root, hash_file, write_json
from launch.runtime.locks import hold_lock

FORMAT = 1  # raised with every change of how rows are read, tokenised and stored
ROWS = "rows.safetensors"
DEV = "dev"  # in a prepared folder, with a folder for each set of development rows
TRUNCATED = "truncated at max_length"
NO_LABEL, NO_NUMBER = "label not in task.labels", "label no number"


class TaskRow(NamedTuple):
    """A row that can be trained on or scored."""

    number: int  # in the split, from 1
    texts: tuple[str, ...]  # one, or a pair
    label: float  # place in task.labels, or a number


class RowFolder(NamedTuple):
    """A finished folder of rows with labels, with its manifest."""

    folder: Path
    manifest: dict
    has_classes: bool  # whether labels are places in task.labels
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


def prepare_rows(
    recipe: Recipe, model_path: Path
) -> tuple[CheckedModel, RowFolder, dict[str, RowFolder]]:
    """Check the base for the task's new head, and prepare the training and development rows.

    Returns:
        The base, the training rows, and name of a score -> development rows.

    Raises:
        UserError: for whatever is wrong with them.
    """
    tokenizer = load_tokenizer(model_path, needs_end=False)
    model = check_model(model_path, head=make_head(recipe.task, model_path, tokenizer))
    return model, *obtain_all_rows(recipe, model_path)


def make_head(task: Task, model_path: Path, tokenizer: PreTrainedTokenizerBase) -> Head:
    """Return what decides the task's new head. Raises UserError."""
    return Head(tuple(task.labels), find_padding(tokenizer, read_config(model_path)))


def obtain_all_rows(
    recipe: Recipe, model_path: Path, output: Path | None = None
) -> tuple[RowFolder, dict[str, RowFolder]]:
    """Find or make the training rows and all development rows, by the name of the score.

    Args:
        output: folder to make them in, in the place of data.prepared or the cache.

    Raises:
        UserError: rows cannot be read, or there are some that the recipe refuses.
    """
    tokenizer = load_tokenizer(model_path, needs_end=False)
    head = make_head(recipe.task, model_path, tokenizer)
    config = read_config(model_path, head=head)
    rows = obtain_rows(recipe.data, recipe.task, model_path, tokenizer, config, output)
    dev = {}
    for name, place in recipe.task.dev_sets.items():
        folder = None if output is None else _name_dev_folder(output, name)
        data = _locate_dev(recipe.data, name, place)
        try:
            dev[name] = obtain_rows(data, recipe.task, model_path, tokenizer, config, folder)
        except UserError as error:
            raise UserError(f"task.dev: {place}: {error}") from None
    for found in (rows, *dev.values()):
        _check_token_types(found.open_tokens(), config)
    return rows, dev


def _name_dev_folder(folder: Path, name: str) -> Path:
    """Return where a prepared folder has the development rows of a score."""
    return folder / DEV / quote(name, safe="")


def _locate_dev(data: Data, name: str, place: str) -> Data:
    """Return where development rows are: in the file or folder of that path, or a split of the data.

    A score is to be of all rows that pass data.filter, so none of them is dropped.
    """
    update = {"limit": None, "on_cut": "keep", "on_bad_row": "refuse"}
    is_path = Path(place).expanduser().exists()
    if data.prepared is not None:
        folder = _name_dev_folder(Path(data.prepared).expanduser(), name)
        update["prepared"] = str(folder)
        if (folder / MANIFEST).is_file():  # the file itself need not be on this machine
            is_path = read_json(folder / MANIFEST)["made_from"]["data"]["path"] == place
    if is_path:
        update |= {"path": place, "split": "train", "config": None}
    else:
        update["split"] = place
    return data.model_copy(update=update)


def _check_token_types(tokens: TokenSet, config: PretrainedConfig) -> None:
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
    model_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    output: Path | None = None,
) -> RowFolder:
    """Find the rows of `data` in data.prepared, or in the cache, where they are made if needed.

    Args:
        model_path: folder of the base.
        tokenizer: of the base.
        config: of the base with its head.
        output: folder to make them in, in the place of both.

    Raises:
        UserError: rows cannot be read, or there are some that the recipe refuses; or a folder holds
            others.
    """
    has_types = _takes_token_types(tokenizer, config)
    origin = {
        "format": FORMAT,
        "data": data.token_fields(),
        "task": task.model_dump(include={"kind", "labels", "sentence1", "sentence2", "label"}),
        "token_types": has_types,
        "tokenizer": hash_tokenizer(model_path),
        "libraries": {name: version(name) for name in ("transformers", "tokenizers", "datasets")},
    }
    option = "--output"
    if output is None and data.prepared is not None:
        folder, option = Path(data.prepared).expanduser(), "data.prepared"
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{option}: {folder} is not there or has no {MANIFEST}; prepare these rows with "
                "launch/prepare.py"
            )
    else:
        source = fetch_source(data)
        origin["source"] = identify_source(source)
        key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]
        folder = output or cache_root() / "rows" / key
        if not (folder / MANIFEST).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_other_files(folder, option)
            with hold_lock(folder / "lock"):
                if not (folder / MANIFEST).is_file():  # another process may have made it meanwhile
                    _write_rows(folder, origin, data, task, tokenizer, has_types, source)
    manifest = read_json(folder / MANIFEST)
    require_same_origin(folder, manifest, origin, option)
    if not (folder / ROWS).is_file() or hash_file(folder / ROWS) != manifest["tokens_sha256"]:
        raise UserError(f"{folder / ROWS}: damaged; delete {folder}, and start again")
    check_refused_rows(manifest, data, cut=TRUNCATED)
    return RowFolder(folder, manifest, bool(task.labels), find_padding(tokenizer, config))


def _refuse_other_files(folder: Path, option: str) -> None:
    """Raise UserError if an unfinished folder holds anything but what a kill may leave there."""
    ours = {"lock", ROWS, f"{ROWS}.tmp", DEV, CALIBRATION_TOKENS}
    others = {file.name for file in folder.iterdir()} - ours
    if others:
        raise UserError(
            f"{option}: {folder} holds other files ({min(others)}); choose an empty or new folder"
        )


def _takes_token_types(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> bool:
    """Return whether the tokenizer tells a pair's texts apart, and the model takes that in."""
    forward = type(make_meta_model(config)).forward
    accepted = "token_type_ids" in inspect.signature(forward).parameters
    return accepted and "token_type_ids" in tokenizer.model_input_names


def _write_rows(
    folder: Path,
    origin: dict,
    data: Data,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    has_types: bool,
    source: Path,
) -> None:
    """Read, check and tokenise all rows, and write them and their manifest."""
    form = make_task_form(task, data)
    split = load_split(data, source, form)
    tally = {"made_from": origin, "read": 0, "selected": 0, "kept": 0, "cut": 0}
    tally |= {"dropped": {}, "examples": {}}
    parts: list[dict[str, Tensor]] = []
    with show_rows(split, data, "tokenise") as advance:
        for chunk in select_rows(split, data, form=form):
            watchdog.heartbeat()
            encoded = tokenize_texts(
                tokenizer, [row.texts for row in chunk.rows], data.max_length, has_types
            )
            parts.append(_keep_rows(chunk.rows, encoded, chunk.bad, data, has_types, tally))
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
    tally["tokens"] = len(tensors["tokens"])
    write_json(folder / MANIFEST, tally | {"tokens_sha256": hash_file(folder / ROWS)})


class EncodedText(NamedTuple):
    """The tokens of one row."""

    ids: list[int]
    types: list[int] | None  # 1 in a pair's second text; None where the model does not take them
    whole_length: int  # tokens before truncation


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, ...]],
    max_length: int,
    has_types: bool,
) -> list[EncodedText]:
    """Tokenise single texts or pairs with the tokenizer's own special tokens, which are kept.

    What is longer than `max_length` is truncated: of a pair the longer text, token by token. Text
    that spells a special token is text (see data.tokenize.encode_texts).

    Raises:
        UserError: the special tokens alone fill `max_length`.
    """
    if not texts:
        return []
    num_special = tokenizer.num_special_tokens_to_add(pair=len(texts[0]) == 2)
    if max_length <= num_special:
        raise UserError(
            f"data.max_length: {max_length} has no room for text beside {num_special} special "
            "tokens; raise it"
        )
    options = {
        "return_attention_mask": False,
        "return_token_type_ids": has_types,
        "verbose": False,
        "split_special_tokens": not isinstance(tokenizer, PreTrainedTokenizer),
    }
    columns = [list(column) for column in zip(*texts, strict=True)]
    whole = tokenizer(*columns, **options)
    encoded = []
    for i, ids in enumerate(whole.input_ids):
        types = whole.token_type_ids[i] if has_types else None
        if len(ids) > max_length:
            cut = tokenizer(*texts[i], truncation="longest_first", max_length=max_length, **options)
            types = cut.token_type_ids if has_types else None
            encoded.append(EncodedText(cut.input_ids, types, len(ids)))
        else:
            encoded.append(EncodedText(ids, types, len(ids)))
    return encoded


def _keep_rows(
    rows: Sequence[TaskRow],
    encoded: Sequence[EncodedText],
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
    for row, text in zip(rows, encoded, strict=True):
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
        labels.append(row.label)
    tally["kept"] += len(labels)
    count_dropped(tally, dropped)
    tensors = {
        "tokens": torch.tensor(ids, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.float64),
    }
    return tensors | ({"token_types": torch.tensor(types, dtype=torch.int8)} if has_types else {})


# Rows and labels


def make_task_form(task: Task, data: Data) -> RowForm:
    """Make the form of rows with one text or two and a label; good rows are a TaskRow."""
    columns = {
        "task.sentence1": [task.sentence1],
        "task.sentence2": [task.sentence2] if task.sentence2 else [],
        "task.label": [task.label],
        "data.filter": list(data.filter),
    }
    return RowForm(columns, lambda number, row: _check_row(number, row, task))


def _check_row(number: int, row: dict[str, Any], task: Task) -> TaskRow | BadRow:
    """Return a row's texts and label, or what is wrong with it."""
    fields = [task.sentence1] + ([task.sentence2] if task.sentence2 else [])
    texts = []
    for field in fields:
        value = row.get(field)
        fault = find_text_fault(value)
        if fault is not None:
            return BadRow(number, fault, f"field {field!r} is {show_value(value)}, {fault}")
        texts.append(value)
    if not any(text.strip() for text in texts):  # GLUE's QQP has pairs with one empty text
        return BadRow(number, EMPTY, f"field {fields[0]!r} is {show_value(texts[0])}, {EMPTY}")
    value = row.get(task.label)
    label = _read_number(value) if task.kind == "regression" else _find_label(value, task.labels)
    if label is None:
        reason, wanted = NO_NUMBER, "a finite number"
        if task.labels:
            reason, wanted = NO_LABEL, f"one of task.labels, {', '.join(task.labels)}"
        return BadRow(
            number, reason, f"field {task.label!r} is {show_value(value)}, which is not {wanted}"
        )
    return TaskRow(number, tuple(texts), label)


def _read_number(value: object) -> float | None:
    """Return a finite number, that of a text too; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _find_label(value: object, labels: Sequence[str]) -> float | None:
    """Return the place of a label: of its text or, where no label is a whole number, its place.

    Data sets of the hub hold places.
    """
    number = _read_number(value)
    is_whole = number is not None and number == int(number)
    text = str(int(number)) if is_whole and not isinstance(value, str) else value
    if text in labels:
        return float(labels.index(text))
    if is_whole and not any(label.lstrip("-").isdigit() for label in labels):
        return number if 0 <= number < len(labels) else None
    return None
