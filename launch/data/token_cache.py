"""Tokenised rows on disk: written once, in steps that a kill does not undo, and memory-mapped.

A folder of tokens holds raw files and two JSON files:

    tokens.bin          int32, the examples one after another
    offsets.bin         int64, (examples + 1,): where each example begins, and the end
    answer_starts.bin   int64, (examples,): each example's prompt length (see TokenSet)
    trained.bin         int8, only of messages: 1 for each token that the loss counts
    manifest.json       written last: what the tokens were made from, counts, sizes and hashes
    progress.json       only while the tokens are made: up to where the files are whole
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from eval.tasks.base import ALPACA_PROMPT
from launch.config.schema import Data
from launch.data.chat.template import ChatTemplate, hash_template, load_template, read_template
from launch.data.chat.tokenize import tokenize_conversations
from launch.data.earlier_tokens import find_doubt
from launch.data.layout import Split
from launch.data.manifest import (
    CUT,
    MANIFEST,
    TOO_LONG,
    check_refused_rows,
    count_dropped,
    make_once,
    name_row,
    read_json,
    require_same_origin,
)
from launch.data.prompts import ALPACA_INPUT_PROMPT
from launch.data.rows import (
    BadRow,
    Chunk,
    fetch_source,
    identify_source,
    list_notes,
    load_split,
    select_rows,
    show_rows,
)
from launch.data.token_set import TokenSet
from launch.data.tokenize import (
    SpecialTokens,
    find_special_tokens,
    tokenize_rows,
    tokenize_text,
)
from launch.models.files import load_tokenizer
from launch.models.identity import hash_tokenizer
from launch.runtime import watchdog
from launch.runtime.errors import UserError
from launch.runtime.files import cache_root, hash_file, sync_file, write_json

FORMAT = 1  # raised with every change of the files' layout
READING = 2  # raised with every change of how rows are read and tokenised
MESSAGES_READING = 2  # raised with every change of that for messages alone
DTYPES = {"tokens": torch.int32, "offsets": torch.int64, "answer_starts": torch.int64}
CHAT_DTYPES = DTYPES | {"trained": torch.int8}  # of messages
PROGRESS = "progress.json"
CACHE = "token cache"  # what errors name in the place of a field
SPECIAL = "text that became special tokens"


class TokenFolder(NamedTuple):
    """A finished folder of tokens, with its manifest."""

    folder: Path
    manifest: dict

    def open_tokens(self) -> TokenSet:
        """Map the tokens into memory. `obtain_tokens` has checked the files' sizes."""
        sizes = _count_numbers(self.manifest)
        tensors = {}
        for name, dtype in list_dtypes(self.manifest["made_from"]).items():
            path = str(self.folder / name_file(name))
            tensors[name] = torch.from_file(path, shared=False, size=sizes[name], dtype=dtype)
        return TokenSet(
            tokens=tensors["tokens"],
            offsets=tensors["offsets"],
            prompt_lengths=tensors["answer_starts"],
            num_truncated=self.manifest["cut"],
            num_dropped=sum(self.manifest["dropped"].values()),
            num_special=self.manifest.get("special", 0),  # earlier versions did not count them
            is_trained=tensors.get("trained"),
        )


def list_dtypes(made_from: dict) -> dict[str, torch.dtype]:
    """Return the dtype of each raw file of tokens that were made from `made_from`."""
    return CHAT_DTYPES if made_from["data"].get("messages") else DTYPES


def obtain_tokens(data: Data, model_path: Path) -> TokenFolder:
    """Find the tokens of `data` in data.prepared, or in the cache, where they are made if needed.

    Args:
        model_path: folder of the model whose tokenizer is used.

    Raises:
        UserError: data.prepared was made from something else or is damaged, and whatever
            `make_tokens` and `check_refused_rows` raise.
    """
    if data.prepared is None:
        tokens = cache_tokens(data, model_path)
    else:
        tokens = open_prepared(data.prepared)
        wanted = describe_origin(data, model_path, source=None)
        _check_finished(tokens, wanted, data, model_path, "data.prepared")
    check_refused_rows(tokens.manifest, data)
    return tokens


def cache_tokens(data: Data, model_path: Path) -> TokenFolder:
    """Find the tokens of `data` in the cache, or make them there, as `make_tokens` does."""
    source = fetch_source(data)
    folder = find_cache_folder("tokens", describe_origin(data, model_path, source))
    return make_tokens(folder, data, model_path, source, option=CACHE)


def find_cache_folder(kind: Literal["tokens", "rows"], made_from: dict) -> Path:
    """Return the folder of the cache for tokens, or rows with labels, made from `made_from`."""
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / kind / key


def open_prepared(path: str) -> TokenFolder:
    """Open the folder that data.prepared names. Raises UserError if it is not finished."""
    folder = Path(path).expanduser()
    if not (folder / MANIFEST).is_file():
        if (folder / PROGRESS).is_file():
            state = "is unfinished; start prepare.py on it again"
        else:
            state = "is not there or has no manifest.json"
        raise UserError(f"data.prepared: {folder} {state}")
    return TokenFolder(folder, read_json(folder / MANIFEST))


def _check_finished(
    tokens: TokenFolder, wanted: dict, data: Data, model_path: Path, option: str
) -> None:
    """Raise UserError if a finished folder was not made from `wanted`, or a file is cut short."""
    is_earlier = "reading" not in tokens.manifest["made_from"]
    if is_earlier:
        wanted = {key: value for key, value in wanted.items() if key != "reading"}
    require_same_origin(tokens.folder, tokens.manifest, wanted, option)
    check_sizes(tokens)
    if is_earlier:
        special = find_special_tokens(load_tokenizer(model_path))
        doubt = find_doubt(tokens.manifest, tokens.open_tokens(), special)
        if doubt is not None and not _gives_same_tokens(tokens, data, model_path):
            raise UserError(
                f"{option}: {tokens.folder} was made by an earlier version, {doubt}; prepare the "
                "rows again into another folder"
            )


def _gives_same_tokens(tokens: TokenFolder, data: Data, model_path: Path) -> bool:
    """Return whether the rows, if they are on this machine, give the same tokens today."""
    if not Path(data.path).expanduser().exists():
        return False
    try:
        again = obtain_tokens(data.model_copy(update={"prepared": None}), model_path)
    except UserError:
        return False
    return again.manifest["tokens_sha256"] == tokens.manifest["tokens_sha256"]


def describe_origin(data: Data, model_path: Path, source: Path | None) -> dict:
    """Describe everything that decides the tokens' bytes.

    Args:
        source: file or folder of the rows; None leaves out their content, which need not be on
            this machine.
    """
    origin = {
        "format": FORMAT,
        "reading": READING,
        "data": data.token_fields(),
        "prompts": [ALPACA_PROMPT, ALPACA_INPUT_PROMPT],
        "tokenizer": hash_tokenizer(model_path, with_config=True),
        "libraries": describe_libraries(),
    }
    if data.messages is not None:
        del origin["prompts"]
        origin["messages_reading"] = MESSAGES_READING
        origin["chat_template"] = hash_template(
            read_template(data.chat_template, load_tokenizer(model_path))
        )
        origin["libraries"]["jinja2"] = version("jinja2")
    if source is not None:
        origin["source"] = identify_source(data, source)
    return origin


def describe_libraries() -> dict[str, str]:
    """Return the versions of the libraries that decide how rows are read and tokenised."""
    return {name: version(name) for name in ("transformers", "tokenizers", "datasets")}


def make_tokens(
    folder: Path,
    data: Data,
    model_path: Path,
    source: Path,
    verify: bool = False,
    option: str = "--output",
) -> TokenFolder:
    """Make the tokens of the rows at `source` in `folder`, unless they are there already.

    After a kill the next process resumes behind the last whole chunk of rows.

    Args:
        verify: whether to compare the hashes of tokens that are there, and not their sizes alone.
        option: what errors about the folder name.

    Raises:
        UserError: the folder holds something else or damaged tokens, rows cannot be read, or no
            row is good.
    """
    wanted = describe_origin(data, model_path, source)

    def write() -> None:
        _write_tokens(folder, wanted, data, load_tokenizer(model_path), source, option)

    make_once(folder, write)
    tokens = TokenFolder(folder, read_json(folder / MANIFEST))
    _check_finished(tokens, wanted, data, model_path, option)
    if verify:
        check_hashes(tokens)
    return tokens


def _write_tokens(
    folder: Path,
    wanted: dict,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    option: str,
) -> None:
    """Write the files chunk by chunk, and the manifest."""
    tally = read_tally(folder, wanted, option)
    split = load_split(data, source)
    template = None
    if data.messages is not None:
        template = load_template(data.chat_template, tokenizer)
    tokenize_chunk = _make_tokenize_chunk(tokenizer, data, template)
    with contextlib.ExitStack() as stack:
        files = {}
        for name in list_dtypes(wanted):
            files[name] = stack.enter_context((folder / name_file(name)).open("ab"))
        _truncate_files(files, tally)
        advance = stack.enter_context(show_rows(split, data, "tokenise"))
        for chunk in select_rows(split, data, tally["read"], tally["selected"]):
            watchdog.heartbeat()
            for name, values in tokenize_chunk(chunk, tally).items():
                files[name].write(torch.tensor(values, dtype=CHAT_DTYPES[name]).numpy())
                files[name].flush()
                os.fsync(files[name].fileno())
            write_json(folder / PROGRESS, tally)
            advance(chunk)
    if not tally["kept"]:
        raise UserError(_describe_no_rows(tally, data))
    tally["files_read"] = [file.name for file in split.list_files()]
    tally["notes"] = list_notes(split, data, tally["unread"], tally["selected"])
    if template is not None:
        tally["notes"] += _list_chat_notes(template, data, tally["names"])
    _write_manifest(folder, tally, split, source, option)


def _truncate_files(files: dict, tally: dict) -> None:
    """Cut off what a killed process wrote after its last whole chunk."""
    sizes = _count_numbers(tally)
    begun = bool(tally["read"])
    for name, file in files.items():
        file.truncate(sizes[name] * CHAT_DTYPES[name].itemsize if begun else 0)
    if not begun:
        files["offsets"].write(torch.zeros(1, dtype=DTYPES["offsets"]).numpy())


def _write_manifest(folder: Path, tally: dict, split: Split, source: Path, option: str) -> None:
    """Check the files' lengths, and write the manifest that marks the folder as finished."""
    sources = hash_source(split, source)
    manifest = tally | {"source_sha256": sources} | describe_files(folder, tally, option)
    write_json(folder / MANIFEST, manifest)
    (folder / PROGRESS).unlink()


def hash_source(split: Split, source: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the files of `split`, which is at the file or folder `source`."""
    root = source if source.is_dir() else source.parent
    return {str(file.relative_to(root)): hash_file(file) for file in split.list_files()}


def describe_files(folder: Path, tally: dict, option: str) -> dict:
    """Return sizes and hashes of the files that `tally` counts, as the manifest has them.

    Raises:
        UserError: a file is not as long as what was written.
    """
    files = {}
    sizes = _count_numbers(tally)
    for name, dtype in list_dtypes(tally["made_from"]).items():
        path = folder / name_file(name)
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        if files[path.name]["bytes"] != sizes[name] * dtype.itemsize:
            raise UserError(
                f"{option}: {path} is not as long as what was written: another process writes "
                f"there too, on a file system without locks; stop it, delete {folder} and prepare "
                "on one machine"
            )
    hashes = "".join(file["sha256"] for file in files.values())
    return {"files": files, "tokens_sha256": hashlib.sha256(hashes.encode()).hexdigest()}


def _make_tokenize_chunk(
    tokenizer: PreTrainedTokenizerBase, data: Data, template: ChatTemplate | None
) -> Callable[[Chunk, dict], dict[str, list[int]]]:
    """Make the function that returns what a chunk adds to each file, and adds it to a tally.

    Args:
        template: of rows with messages.
    """
    if template is None:
        special = find_special_tokens(tokenizer)
        return lambda chunk, tally: _tokenize_chunk(chunk, tokenizer, special, data, tally)
    return lambda chunk, tally: _tokenize_chat_chunk(chunk, template, data, tally)


def _list_chat_notes(template: ChatTemplate, data: Data, names: Sequence[str]) -> list[str]:
    """List what names the messages had, and what of a turn is not learnt, for people."""
    notes = [f"data.messages: messages of {data.messages!r} have {one}" for one in names]
    if not template.learns_end:
        notes.append(
            f"data.chat_template: its marks leave out {template.end_of_turn}, so where to stop is not "
            "learnt"
        )
    return notes


def _tokenize_chunk(
    chunk: Chunk,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    data: Data,
    tally: dict,
) -> dict[str, list[int]]:
    """Return what a chunk adds to each file, and add it to `tally`."""
    added: dict[str, list[int]] = {name: [] for name in DTYPES}
    bad = list(chunk.bad)
    if data.text_field is not None:
        texts = [row.instruction for row in chunk.rows]
        for ids, prompt_length in tokenize_text(tokenizer, texts, data.max_length, special):
            tally["special"] += not special.ids.isdisjoint(ids[special.num_before :])
            _add_example(added, tally, ids, prompt_length)
        tokenized = []
    else:
        tokenized = zip(chunk.rows, tokenize_rows(chunk.rows, tokenizer), strict=True)
    for row, (ids, prompt_length) in tokenized:
        fault = _check_length(row.number, len(ids), prompt_length, data, tally)
        if fault is not None:
            bad.append(fault)
            continue
        if special.occur_in(ids):
            tally["special"] += 1
            name_row(tally, BadRow(row.number, SPECIAL, f"it holds {SPECIAL}"))
        _add_example(added, tally, ids[: data.max_length], prompt_length)
    _add_chunk(chunk, bad, tally)
    return added


def _tokenize_chat_chunk(
    chunk: Chunk, template: ChatTemplate, data: Data, tally: dict
) -> dict[str, list[int]]:
    """Return what a chunk of messages adds to each file, and add it to `tally`."""
    added: dict[str, list[int]] = {name: [] for name in CHAT_DTYPES}
    bad = list(chunk.bad)
    for row, found in tokenize_conversations(chunk.rows, template, data.messages, data.train_on):
        if isinstance(found, BadRow):
            bad.append(found)
            continue
        if found.names not in tally["names"]:
            tally["names"].append(found.names)
        # No token that is learnt sees what follows the last of them, which would only be cut.
        end = len(found.is_trained) - found.is_trained[::-1].index(1)
        ids, is_trained = found.ids[:end], found.is_trained[:end]
        prompt_length = is_trained.index(1)
        fault = _check_length(row.number, len(ids), prompt_length, data, tally)
        if fault is not None:
            bad.append(fault)
            continue
        ids, is_trained = ids[: data.max_length], is_trained[: data.max_length]
        _add_example(added, tally, ids, prompt_length)
        added["trained"] += is_trained
        tally["answer_tokens"] += sum(is_trained) - (len(ids) - prompt_length)
    _add_chunk(chunk, bad, tally)
    return added


def _check_length(
    number: int, length: int, prompt_length: int, data: Data, tally: dict
) -> BadRow | None:
    """Return why a row is left out for its length; note in `tally` one that is cut and kept."""
    limit = min(length, data.max_length)
    if prompt_length >= limit:
        what = f"its prompt alone has {prompt_length} tokens, data.max_length is {limit}"
        return BadRow(number, TOO_LONG, what)
    if length > limit:
        cut = BadRow(number, CUT, f"its answer is cut, {length} tokens to {limit}")
        if data.on_cut == "drop":
            return cut
        tally["cut"] += 1
        name_row(tally, cut)
    elif length == data.max_length:
        # By their length these would pass for cut ones (launch.data.mix counts those it takes).
        tally.setdefault("exact_fits", []).append(tally["kept"])
    return None


def _add_chunk(chunk: Chunk, bad: Sequence[BadRow], tally: dict) -> None:
    """Note in `tally` that a chunk was read, and its bad rows."""
    count_dropped(tally, bad)
    for name, count in chunk.unread.items():
        tally["unread"][name] = tally["unread"].get(name, 0) + count
    tally |= {"read": chunk.position, "selected": chunk.selected}


def _add_example(
    added: dict[str, list[int]], tally: dict, ids: list[int], prompt_length: int
) -> None:
    """Add an example to what a chunk adds to each file, and to `tally`."""
    tally["tokens"] += len(ids)
    tally["answer_tokens"] += len(ids) - prompt_length
    tally["kept"] += 1
    added["tokens"] += ids
    added["offsets"].append(tally["tokens"])
    added["answer_starts"].append(prompt_length)


def _count_numbers(tally: dict) -> dict[str, int]:
    """Return how many numbers each file holds."""
    return {
        "tokens": tally["tokens"],
        "offsets": tally["kept"] + 1,
        "answer_starts": tally["kept"],
        "trained": tally["tokens"],
    }


def read_tally(folder: Path, wanted: dict, option: str) -> dict:
    """Read up to where the folder's files are whole; all zero in a new folder.

    Raises UserError if the folder holds something else.
    """
    if (folder / PROGRESS).is_file():
        tally = read_json(folder / PROGRESS)
        require_same_origin(folder, tally, wanted, option)
        return {"unread": {}, "names": []} | tally  # earlier versions did not count them
    # What a kill before the first chunk may leave.
    ours = {"lock", f"{PROGRESS}.tmp", *map(name_file, CHAT_DTYPES)}
    refuse_other_files(folder, ours, option)
    names = ("read", "selected", "kept", "cut", "special", "tokens", "answer_tokens")
    counts = dict.fromkeys(names, 0)
    return {"made_from": wanted, **counts, "dropped": {}, "examples": {}, "unread": {}, "names": []}


def refuse_other_files(folder: Path, ours: Collection[str], option: str) -> None:
    """Raise UserError if an unfinished folder holds anything but the files that `ours` names."""
    others = {file.name for file in folder.iterdir()}.difference(ours)
    if others:
        raise UserError(
            f"{option}: {folder} holds other files ({min(others)}); choose an empty or new folder"
        )


def _describe_no_rows(tally: dict, data: Data) -> str:
    """Say why nothing is left to train on."""
    if not tally["selected"]:
        reason = f"no row has {data.filter}" if data.filter else "it has no rows"
        return f"data.path: nothing to train on in {data.path}: {reason}"
    if TOO_LONG in tally["dropped"]:
        return f"data.max_length: no row has an answer token within it ({data.path}); raise it"
    if not tally["examples"]:
        return f"data.path: the rows of {data.path} are blank"
    row, what = min(rows[0] for rows in tally["examples"].values())
    return (
        f"data.path: row {row} of {data.path}: {what}; and no other of {tally['selected']} rows "
        "can be trained on"
    )


def check_sizes(tokens: TokenFolder) -> None:
    """Raise UserError if a file is not as long as it was written."""
    for name, file in tokens.manifest["files"].items():
        path = tokens.folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            found = "missing" if size is None else f"{size} bytes, not {file['bytes']}"
            raise UserError(f"{path}: damaged ({found}); delete {tokens.folder} and prepare again")


def check_hashes(tokens: TokenFolder) -> None:
    """Raise UserError if a file's content has changed since it was written."""
    for name, file in tokens.manifest["files"].items():
        if hash_file(tokens.folder / name) != file["sha256"]:
            raise UserError(
                f"{tokens.folder / name}: damaged, its hash is not the manifest's; delete "
                f"{tokens.folder} and prepare again"
            )


def name_file(name: str) -> str:
    """Return the file name of raw numbers: of `tokens`, `tokens.bin`."""
    return f"{name}.bin"
