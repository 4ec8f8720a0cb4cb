"""The tokens of a mix: a folder as launch.data.token_cache makes them, from those of its sources.

Each source is tokenised and cached as if it were the only one. The mix holds copies of the examples
that are chosen: source after source in the order of their names, then the held-out ones likewise.
Which ones they are depends on neither train.seed, by which the steps' order is drawn, nor the number
of ranks, so runs with several seeds train on the same mix and measure the same held-out rows.
"""

import contextlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from launch.config.rows import MixedRows
from launch.config.schema import MIXED_FIELDS, Data
from launch.data.manifest import (
    MANIFEST,
    check_refused_rows,
    make_once,
    read_json,
    require_same_origin,
)
from launch.data.mix.shares import Share, choose_examples, find_scarce, plan_shares
from launch.data.rows import naming_fields
from launch.data.token_cache import (
    CACHE,
    CHAT_DTYPES,
    PROGRESS,
    TokenFolder,
    cache_tokens,
    check_hashes,
    check_sizes,
    describe_files,
    describe_origin,
    find_cache_folder,
    list_dtypes,
    name_file,
    open_prepared,
    read_tally,
)
from launch.data.token_set import TokenSet, count_shared, read_bytes
from launch.runtime import watchdog
from launch.runtime.files import write_json

MIXING = 1  # raised with every change of which examples a mix has, or in which order
CHUNK = 2000  # examples that are copied at a time
_ROW_FIELDS = [name for name in MixedRows.model_fields if name not in MIXED_FIELDS]


def obtain_mix(data: Data, model_path: Path) -> TokenFolder:
    """Find the tokens of a mix in data.prepared, or in the cache, where they are made if needed.

    Raises:
        UserError: data.prepared was made from something else or is damaged; a source cannot be read,
            has rows that are refused, or has too few (see `plan_shares`).
    """
    if data.prepared is not None:
        tokens = open_prepared(data.prepared)
        wanted = describe_mix_origin(data, model_path, parts=None)
        require_same_origin(tokens.folder, tokens.manifest, wanted, "data.prepared")
        check_sizes(tokens)
        check_refused_sources(tokens.manifest["parts"], data)
        return tokens
    parts = cache_sources(data, model_path)
    check_refused_sources({name: part.manifest for name, part in parts.items()}, data)
    folder = find_cache_folder("tokens", describe_mix_origin(data, model_path, parts))
    return make_mix(folder, data, model_path, parts, option=CACHE)


def cache_sources(data: Data, model_path: Path) -> dict[str, TokenFolder]:
    """Find or make the tokens of each source in the cache. Raises UserError naming the source."""
    parts = {}
    for name, source in data.list_sources().items():
        with naming_fields(f"data.sources.{name}", _ROW_FIELDS):
            parts[name] = cache_tokens(source, model_path)
    return parts


def check_refused_sources(manifests: Mapping[str, dict], data: Data) -> None:
    """Raise UserError if a source has rows that data.on_bad_row or data.on_cut says to refuse.

    Args:
        manifests: name of a source -> manifest of its tokens.
    """
    for name, source in data.list_sources().items():
        with naming_fields(f"data.sources.{name}", _ROW_FIELDS):
            check_refused_rows(manifests[name], source)


def describe_mix_origin(
    data: Data, model_path: Path, parts: Mapping[str, TokenFolder] | None
) -> dict:
    """Describe everything that decides the bytes of a mix, under the names of the recipe's fields.

    Args:
        parts: the sources' tokens; None leaves out their content, which need not be on this machine.
    """
    origin: dict = {"data.sources": sorted(data.sources), "mixing": MIXING}
    shared = {name: value for name, value in data.token_fields().items() if name != "sources"}
    with_messages = sorted(name for name, rows in data.sources.items() if rows.messages)
    origin["data"] = shared | ({"messages": with_messages} if with_messages else {})
    libraries: dict[str, str] = {}
    for name, source in sorted(data.list_sources().items()):
        origin[f"data.sources.{name}"] = data.sources[name].model_dump()
        made_from = describe_origin(source, model_path, source=None)
        libraries |= made_from.pop("libraries")
        del made_from["data"]
        origin |= made_from  # tokenizer, prompts and so on: the same for all that have them
        if parts is not None:
            manifest = parts[name].manifest
            content = {"tokens_sha256": manifest["tokens_sha256"]}
            origin[f"source.{name}"] = content | manifest["made_from"]["source"]
    return origin | {"libraries": libraries}


def make_mix(
    folder: Path,
    data: Data,
    model_path: Path,
    parts: Mapping[str, TokenFolder],
    verify: bool = False,
    option: str = "--output",
) -> TokenFolder:
    """Make the tokens of a mix in `folder`, unless they are there already.

    Args:
        parts: the sources' tokens.
        verify: whether to compare the hashes of tokens that are there, and not their sizes alone.
        option: what errors about the folder name.

    Raises:
        UserError: the folder holds something else or damaged tokens, or a source has too few rows.
    """
    wanted = describe_mix_origin(data, model_path, parts)

    def write() -> None:
        read_tally(folder, wanted, option)  # refuses a folder of something else
        _write_mix(folder, wanted, data, parts, option)

    make_once(folder, write)
    tokens = TokenFolder(folder, read_json(folder / MANIFEST))
    require_same_origin(folder, tokens.manifest, wanted, option)
    check_sizes(tokens)
    if verify:
        check_hashes(tokens)
    return tokens


def _write_mix(
    folder: Path, wanted: dict, data: Data, parts: Mapping[str, TokenFolder], option: str
) -> None:
    """Write the files from their beginning, and the manifest that marks the folder as finished.

    Raises UserError if a source has too few rows.
    """
    sets = {name: parts[name].open_tokens() for name in sorted(parts)}
    sources = {name: data.sources[name] for name in sets}
    sizes = {name: len(tokens) for name, tokens in sets.items()}
    shares = plan_shares(sizes, sources, data.held_out)
    # From here on the folder is this mix's: after a kill it is written again.
    write_json(folder / PROGRESS, {"made_from": wanted})
    chosen = _choose(sets, shares)
    totals = {"tokens": 0, "kept": 0, "answer_tokens": 0, "cut": 0, "special": 0}
    with contextlib.ExitStack() as stack:
        files = {}
        for name in list_dtypes(wanted):
            files[name] = stack.enter_context((folder / name_file(name)).open("wb"))
        _write(files["offsets"], "offsets", torch.zeros(1))
        for name, examples in chosen:
            lengths = sets[name].lengths()
            for chunk in examples.split(CHUNK):
                watchdog.heartbeat()
                _copy_examples(files, sets[name], lengths[chunk], chunk, totals)
            totals["cut"] += _count_cut(parts[name].manifest, sets[name], examples)
    dropped: dict[str, int] = {}
    for part in parts.values():
        for reason, count in part.manifest["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
        totals["special"] += part.manifest.get("special", 0)
    tally = {"made_from": wanted, **totals, "dropped": dropped}
    manifest = tally | {
        "shares": {name: share._asdict() for name, share in shares.items()},
        "scarce_sources": find_scarce(shares, sources),
        "held_out_trained": _count_trained(sets, chosen, len(shares)),
        "parts": {name: part.manifest for name, part in parts.items()},
    }
    write_json(folder / MANIFEST, manifest | describe_files(folder, tally, option))
    (folder / PROGRESS).unlink()


def _choose(sets: Mapping[str, TokenSet], shares: Mapping[str, Share]) -> list[tuple[str, Tensor]]:
    """Return each source's name with its examples to train on, then with those held out."""
    training, held_out = [], []
    for name, share in shares.items():
        training.append((name, choose_examples(name, share.available, share.rows)))
        held_out.append((name, torch.arange(share.available, len(sets[name]))))
    return training + held_out


def _write(file: IO[bytes], name: str, values: Tensor) -> None:
    file.write(values.to(CHAT_DTYPES[name]).numpy())


def _copy_examples(
    files: Mapping[str, IO[bytes]],
    tokens: TokenSet,
    lengths: Tensor,
    examples: Tensor,
    totals: dict[str, int],
) -> None:
    """Add examples of these lengths to the files of a mix, and to its totals."""
    prompts = tokens.prompt_lengths[examples]
    bounds = zip(tokens.offsets[examples].tolist(), lengths.tolist(), strict=True)
    spans = [slice(start, start + length) for start, length in bounds]
    _write(files["tokens"], "tokens", _join([tokens.tokens[span] for span in spans]))
    _write(files["answer_starts"], "answer_starts", prompts)
    _write(files["offsets"], "offsets", totals["tokens"] + lengths.cumsum(0))
    answers = int((lengths - prompts).sum())
    if "trained" in files:
        if tokens.is_trained is not None:
            masks = [tokens.is_trained[span] for span in spans]
        else:
            masks = []
            for length, prompt in zip(lengths.tolist(), prompts.tolist(), strict=True):
                masks.append(torch.arange(length) >= prompt)
        trained = _join(masks)
        _write(files["trained"], "trained", trained)
        answers = int(trained.sum())
    totals["answer_tokens"] += answers
    totals["tokens"] += int(lengths.sum())
    totals["kept"] += len(examples)


def _join(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if pieces else torch.empty(0)


def _count_cut(manifest: dict, tokens: TokenSet, examples: Tensor) -> int:
    """Count the examples that were cut at max_length: they fill it, and some that fit do too.

    Tokens that earlier versions cached do not name the latter, which count as cut then.
    """
    if manifest["cut"] == 0:  # blocks of plain text fill it too
        return 0
    is_cut = tokens.lengths() == manifest["made_from"]["data"]["max_length"]
    is_cut[torch.tensor(manifest.get("exact_fits", []), dtype=torch.int64)] = False
    return int(is_cut[examples].sum())


def _count_trained(
    sets: Mapping[str, TokenSet], chosen: list[tuple[str, Tensor]], num_sources: int
) -> int:
    """Count the held-out examples whose very tokens are trained on too: a row may be in two sources.

    Args:
        chosen: of `_choose`.
    """
    parts = [read_bytes(sets[name], examples.unique().tolist()) for name, examples in chosen]
    held_out, training = chain(*parts[num_sources:]), chain(*parts[:num_sources])
    return count_shared([held_out], training)[0]
