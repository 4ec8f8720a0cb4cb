"""Tokenised rows on disk: written once, in steps that a kill does not undo, and memory-mapped by every rank.

A folder holds tokens.bin (int32, rows end to end), offsets.bin and answer_starts.bin (both int64; what they are says
launch.data.tokenize.TokenSet) and, written last, manifest.json: what the tokens were made from, what was kept, cut
and dropped, and each file's size and hash. While they are made, progress.json says up to where the files are whole.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval.tasks.base import ALPACA
from launch.config.schema import Data
from launch.data import sources as rows
from launch.data.sources import BadRow, Chunk
from launch.data.tokenize import ALPACA_INPUT, TokenSet, tokenise
from launch.runtime import watchdog as watch
from launch.runtime.errors import UserError
from launch.runtime.files import cache_root, locked, sync, write_json
from launch.runtime.model_files import file_hash, load_tokenizer, tokenizer_hash

FORMAT = 1
DTYPES = {"tokens": torch.int32, "offsets": torch.int64, "answer_starts": torch.int64}
MANIFEST, PROGRESS = "manifest.json", "progress.json"
TOO_LONG, CUT = "no answer token within max_length", "answer cut at max_length"
EXAMPLES = 3  # rows of each reason that are named


class Prepared(NamedTuple):
    """A folder of tokens and its manifest."""

    folder: Path
    manifest: dict

    def open(self) -> TokenSet:
        """The tokens, memory-mapped. Files that are not as long as they were written were refused before."""
        sizes = _sizes(self.manifest)
        tensors = {
            name: torch.from_file(
                str(self.folder / _file(name)), shared=False, size=sizes[name], dtype=dtype
            )
            for name, dtype in DTYPES.items()
        }
        dropped = sum(self.manifest["dropped"].values())
        return TokenSet(**tensors, num_cut=self.manifest["cut"], num_left_out=dropped)


def obtain(data: Data, model_path: Path) -> Prepared:
    """The tokens of `data` with the tokenizer in `model_path`: of data.prepared, else of the cache, made if need be.

    Raises:
        UserError: data.prepared was made from something else, or is damaged; what `make` and `accept` raise.
    """
    if data.prepared is None:
        path = rows.fetch(data)
        wanted = made_from(data, model_path, path)
        key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
        prepared = make(cache_root() / "tokens" / key, data, model_path, path)
    else:
        folder = Path(data.prepared).expanduser()
        if not (folder / MANIFEST).is_file():
            unfinished = (folder / PROGRESS).is_file()
            what = (
                "is unfinished; start prepare.py on it again"
                if unfinished
                else "is not there or has no manifest.json"
            )
            raise UserError(f"data.prepared: {folder} {what}")
        prepared = Prepared(folder, _read(folder / MANIFEST))
        _require_same(prepared, made_from(data, model_path, None), "data.prepared")
        _check_sizes(prepared)
    accept(prepared.manifest, data)
    return prepared


def made_from(data: Data, model_path: Path, path: Path | None) -> dict:
    """What changes the tokens' bytes.

    `path` is that of the rows; None leaves out what they hold, which need not be on this machine.
    """
    return {
        "format": FORMAT,
        "data": data.of_tokens(),
        "prompts": [ALPACA, ALPACA_INPUT],
        "tokenizer": tokenizer_hash(model_path),
        "libraries": {name: version(name) for name in ("transformers", "tokenizers", "datasets")},
    } | ({"source": rows.identify(path)} if path else {})


def make(folder: Path, data: Data, model_path: Path, path: Path, verify: bool = False) -> Prepared:
    """Tokens of the rows at `path` in `folder`: those that are there, whole, or made, on from where a kill left them.

    Args:
        verify: read the tokens that are there and compare their hashes, not their sizes alone.

    Raises:
        UserError: the folder holds something else, or damaged tokens; rows that cannot be read; no row that is good.
    """
    wanted = made_from(data, model_path, path)
    if not (folder / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not (folder / MANIFEST).is_file():  # it may have come while this waited
                _make(folder, wanted, data, load_tokenizer(model_path), path)
    prepared = Prepared(folder, _read(folder / MANIFEST))
    _require_same(prepared, wanted, "--output")
    _check_sizes(prepared)
    for name, of in prepared.manifest["files"].items() if verify else ():
        if file_hash(folder / name) != of["sha256"]:
            raise UserError(
                f"{folder / name}: damaged, its hash is not the manifest's; delete {folder} and prepare again"
            )
    return prepared


def accept(manifest: dict, data: Data) -> None:
    """Raises UserError, naming the first row and the counts, if there are rows that `data` says to refuse."""
    refused = dict(manifest["dropped"]) if data.on_bad_row == "refuse" else {}
    refused.pop(CUT, None)
    if data.on_cut == "refuse" and manifest["cut"]:
        refused[CUT] = manifest["cut"]
    if not refused:
        return
    row, what, reason = min((*manifest["examples"][reason][0], reason) for reason in refused)
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
    remedies = ["data.on_cut=keep or drop"] if CUT in refused else []
    remedies += ["data.on_bad_row=drop"] if refused.keys() - {CUT} else []
    field = "data.max_length" if reason in (CUT, TOO_LONG) else "data.path"
    raise UserError(
        f"{field}: row {row} of {data.path}: {what}; in all {counts}, of {manifest['selected']} rows: mend them, "
        f"or set {' and '.join(remedies)}"
    )


def _make(
    folder: Path, wanted: dict, data: Data, tokenizer: PreTrainedTokenizerBase, path: Path
) -> None:
    """Write the files and the manifest, chunk by chunk."""
    tally = _tally(folder, wanted)
    dataset = rows.load(data, path)
    total = len(dataset) if data.limit is None else min(data.limit, len(dataset))
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / _file(name)).open("ab")) for name in DTYPES}
        sizes = _sizes(tally)
        for name, file in files.items():
            file.truncate(
                sizes[name] * DTYPES[name].itemsize if tally["read"] else 0
            )  # what a kill left half written
        if not tally["read"]:
            files["offsets"].write(torch.zeros(1, dtype=DTYPES["offsets"]).numpy())
        bar = stack.enter_context(
            tqdm(total=total, desc="tokenise", unit=" rows", disable=not sys.stderr.isatty())
        )
        for chunk in rows.select(dataset, data, tally["read"], tally["selected"]):
            watch.mark()
            for name, values in _encode(chunk, tokenizer, data, tally).items():
                files[name].write(torch.tensor(values, dtype=DTYPES[name]).numpy())
                files[name].flush()
                os.fsync(files[name].fileno())
            write_json(folder / PROGRESS, tally)
            bar.update((chunk.position if data.limit is None else chunk.selected) - bar.n)
    if not tally["kept"]:
        raise UserError(_nothing(tally, data))
    described = {_file(name): _describe(folder / _file(name)) for name in DTYPES}
    for name, size in _sizes(tally).items():
        if described[_file(name)]["bytes"] != size * DTYPES[name].itemsize:
            raise UserError(
                f"--output: {folder / _file(name)} is not as long as what was written: another process writes there "
                f"too, on a file system without locks; stop it, delete {folder} and prepare on one machine"
            )
    content = hashlib.sha256(
        "".join(of["sha256"] for of in described.values()).encode()
    ).hexdigest()
    hashes = {name: file_hash(file) for name, file in rows.data_files(path).items()}
    write_json(
        folder / MANIFEST,
        tally | {"source_sha256": hashes, "files": described, "tokens_sha256": content},
    )
    (folder / PROGRESS).unlink()


def _encode(
    chunk: Chunk, tokenizer: PreTrainedTokenizerBase, data: Data, tally: dict
) -> dict[str, list[int]]:
    """What a chunk adds to each file; `tally` is brought forward."""
    added: dict[str, list[int]] = {name: [] for name in DTYPES}
    bad = list(chunk.bad)
    for row, (ids, start) in zip(chunk.rows, tokenise(chunk.rows, tokenizer), strict=True):
        length = min(len(ids), data.max_length)
        if start >= length:
            bad.append(
                BadRow(
                    row.number,
                    TOO_LONG,
                    f"its prompt alone has {start} tokens, data.max_length is {length}",
                )
            )
            continue
        if len(ids) > length:
            cut = BadRow(row.number, CUT, f"its answer is cut, {len(ids)} tokens to {length}")
            if data.on_cut == "drop":
                bad.append(cut)
                continue
            tally["cut"] += 1
            _remember(tally, cut)
        tally["tokens"] += length
        tally["answer_tokens"] += length - start
        tally["kept"] += 1
        added["tokens"] += ids[:length]
        added["offsets"].append(tally["tokens"])
        added["answer_starts"].append(start)
    for row in bad:
        tally["dropped"][row.reason] = tally["dropped"].get(row.reason, 0) + 1
        _remember(tally, row)
    tally |= {"read": chunk.position, "selected": chunk.selected}
    return added


def _sizes(tally: dict) -> dict[str, int]:
    """Numbers in each file."""
    return {"tokens": tally["tokens"], "offsets": tally["kept"] + 1, "answer_starts": tally["kept"]}


def _remember(tally: dict, row: BadRow) -> None:
    examples = tally["examples"].setdefault(row.reason, [])
    if len(examples) < EXAMPLES:
        examples.append([row.number, row.what])


def _tally(folder: Path, wanted: dict) -> dict:
    """How far the folder's files are whole; from nothing if they are not begun. Raises UserError for other content."""
    if (folder / PROGRESS).is_file():
        begun = Prepared(folder, _read(folder / PROGRESS))
        _require_same(begun, wanted, "--output")
        return begun.manifest
    ours = {
        "lock",
        *map(_file, DTYPES),
        f"{PROGRESS}.tmp",
    }  # what a kill before the first chunk may leave
    if others := {file.name for file in folder.iterdir()} - ours:
        raise UserError(
            f"--output: {folder} holds other files ({min(others)}); choose an empty or new folder"
        )
    counts = dict.fromkeys(("read", "selected", "kept", "cut", "tokens", "answer_tokens"), 0)
    return {"made_from": wanted, **counts, "dropped": {}, "examples": {}}


def _nothing(tally: dict, data: Data) -> str:
    if not tally["selected"]:
        return f"data.path: nothing to train on in {data.path}: " + (
            f"no row has {data.keep}" if data.keep else "it has no rows"
        )
    if TOO_LONG in tally["dropped"]:
        return "data.max_length: no row has an answer token within it; raise it"
    row, what = min(examples[0] for examples in tally["examples"].values())
    return f"data.path: row {row} of {data.path}: {what}; and no other of {tally['selected']} rows can be trained on"


def _require_same(prepared: Prepared, wanted: dict, option: str) -> None:
    """Raises UserError, naming the first thing in which the tokens were made from another than `wanted`."""
    old = prepared.manifest["made_from"]
    for key, now in json.loads(json.dumps(wanted)).items():
        for name, (before, after) in _pairs(key, old.get(key), now):
            if before != after:
                values = f"{json.dumps(before)[:80]}, now {json.dumps(after)[:80]}"
                raise UserError(
                    f"{option}: {prepared.folder} was made with another {name} ({values}); bring that back, or prepare "
                    "into another folder"
                )


def _pairs(key: str, old: object, new: object) -> Iterable[tuple[str, tuple]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            (f"{key}.{name}", (old.get(name), new.get(name)))
            for name in dict.fromkeys([*new, *old])
        ]
    return [(key, (old, new))]


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete {path.parent} and prepare again"
        ) from None


def _check_sizes(prepared: Prepared) -> None:
    for name, of in prepared.manifest["files"].items():
        path = prepared.folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != of["bytes"]:
            found = "missing" if size is None else f"{size} bytes, not {of['bytes']}"
            raise UserError(
                f"{path}: damaged ({found}); delete {prepared.folder} and prepare again"
            )


def _describe(path: Path) -> dict:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _file(name: str) -> str:
    return f"{name}.bin"
