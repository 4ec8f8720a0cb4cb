"""What a run starts from: a local model folder and tokens, checked and prepared once on each node."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launch.config.rows import MixedRows
from launch.config.schema import MIXED_FIELDS, Data, Recipe
from launch.data.calibration_tokens import (
    CALIBRATION_NAMES,
    obtain_calibration_rows,
    obtain_calibration_tokens,
)
from launch.data.labelled.encode import describe_pairs
from launch.data.mix.tokens import obtain_mix
from launch.data.rows import rename_notes
from launch.data.task_rows import RowFolder, describe_dev, prepare_rows
from launch.data.token_cache import TokenFolder, obtain_tokens
from launch.data.token_set import TokenSet, count_shared, read_bytes, split_held_out
from launch.models.check import (
    CheckedModel,
    check_max_length,
    check_model,
    check_token_ids,
    read_config,
)
from launch.models.files import fetch_model, find_commit, hash_weights, load_tokenizer
from launch.models.head import Head
from launch.models.identity import hash_config
from launch.runtime.devices import has_bf16
from launch.runtime.distributed import print_rank0, run_on_each_node
from launch.runtime.errors import UserError


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, and where they are from."""

    tokens: TokenSet
    data: dict  # path, counts and hash of the tokens, as results.json has them


@dataclass(frozen=True)
class Inputs:
    """What `prepare_inputs` found, the same on every rank but for the local path."""

    model: CheckedModel  # in this node's folder
    dtype: torch.dtype  # of the base
    tokens: TokenSet  # to train on
    dev: dict[str, TokenSet]  # name of a score -> development rows (task.dev)
    held_out: TokenSet | None  # the last data.held_out examples, which are not in `tokens`
    base: dict  # name, revision and hash of the base model, as results.json has them
    data: dict  # path, counts and hash of the tokens, as results.json has them
    calibration: Examples  # to calibrate on: those of calibration.data, or the training examples

    @property
    def model_path(self) -> Path:
        """The base's folder on this node."""
        return self.model.folder

    @property
    def head(self) -> Head | None:
        """The new head that the run puts on the base; None for a causal task."""
        return self.model.head


def prepare_inputs(recipe: Recipe, device: torch.device) -> Inputs:
    """Fetch, check and tokenise what `recipe` names. Collective.

    Local rank 0 of every node does the work, so no shared disk is needed. Tokens that a node has
    already are not made again. Every rank maps them into its memory. Rank 0 prints what
    is unusual about the rows.

    Raises:
        UserError: on every rank, for whatever any node finds wrong, or if the data or the weights
            differ between nodes.
    """
    nodes = run_on_each_node(lambda: _prepare_node(recipe))
    first = nodes[0]
    fields = {"data": recipe.data.field, "calibration_data": "calibration.data.path"}
    for node in nodes:
        for name, source in node["data"].get("sources", {}).items():
            if source["tokens_sha256"] != first["data"]["sources"][name]["tokens_sha256"]:
                raise UserError(_describe_difference(f"data.sources.{name}.path", node, first))
        for key, field in fields.items():
            if node[key]["tokens_sha256"] != first[key]["tokens_sha256"]:
                raise UserError(_describe_difference(field, node, first))
        if node["data"].get("dev") != first["data"].get("dev"):
            raise UserError(_describe_difference("task.dev", node, first))
        for key in ("weights_sha256", "config_sha256"):
            if node["base"][key] != first["base"][key]:
                raise UserError(_describe_difference("model.name", node, first))
    for note in first["notes"]:
        print_rank0(note)
    here = nodes[dist.get_rank()]
    tokens = here["tokens"].open_tokens()
    training, held_out = split_held_out(tokens, recipe.data.held_out)
    calibration = Examples(training, first["data"])
    if here["calibration_tokens"] is not None:
        calibration = Examples(here["calibration_tokens"].open_tokens(), first["calibration_data"])
    return Inputs(
        model=here["model"],
        dtype=resolve_dtype(recipe.model.dtype, has_bf16(device)),
        tokens=training,
        dev={name: rows.open_tokens() for name, rows in here["dev"].items()},
        held_out=held_out,
        base=first["base"],
        data=first["data"],
        calibration=calibration,
    )


def _describe_difference(field: str, node: dict, first: dict) -> str:
    return f"{field}: its content on {node['host']} is not {first['host']}'s; copy it"


def _prepare_node(recipe: Recipe) -> dict:
    """Prepare this node, and describe the result in values that ranks can exchange."""
    model_path = fetch_model(recipe.model.name, recipe.model.revision)
    check_max_length(recipe.data.max_length, read_config(model_path), recipe.model.name)
    dev: dict[str, RowFolder] = {}
    if recipe.task.has_head:
        model, tokens, dev = prepare_rows(recipe, model_path)
    else:
        model = check_model(model_path, new_weights=recipe.model.new_weights)
        obtain = obtain_mix if recipe.data.sources else obtain_tokens
        tokens = obtain(recipe.data, model_path)
    describe = describe_mixed_tokens if recipe.data.sources else _describe_tokens
    data = describe(tokens, recipe.data) | describe_dev(dev)
    calibration_tokens, calibration_data = None, data
    if recipe.calibration_source is not None:
        if recipe.task.has_head:
            calibration_tokens = obtain_calibration_rows(recipe, model_path)
        else:
            calibration_tokens = obtain_calibration_tokens(recipe.calibration_source, model_path)
        calibration_data = _describe_tokens(calibration_tokens, recipe.calibration_source)
    _count_copies(data, tokens, dev, calibration_tokens, recipe)
    tokenizer = load_tokenizer(model_path, needs_end=not recipe.task.has_head)
    for made in filter(None, (tokens, calibration_tokens, *dev.values())):
        largest = int(made.open_tokens().tokens.max())
        check_token_ids(largest, model.num_embeddings, tokenizer)
    model_commit = find_commit(model_path)
    notes = _list_notes(tokens, dev, calibration_tokens)
    if recipe.task.sentence2 is not None:
        notes += filter(None, [describe_pairs(tokenizer)])
    return {
        "host": socket.gethostname(),
        "model": model,
        "base": {
            "name": recipe.model.name,
            "revision": model_commit or recipe.model.revision,
            "revision_verified": model_commit is not None,
            "weights_sha256": hash_weights(model.files),
            "config_sha256": hash_config(model_path),
        },
        "tokens": tokens,
        "data": data,
        "dev": dev,
        "calibration_tokens": calibration_tokens,
        "calibration_data": calibration_data,
        "notes": notes,
    }


def _count_copies(
    described: dict,
    tokens: TokenFolder | RowFolder,
    dev: dict[str, RowFolder],
    calibration_tokens: TokenFolder | RowFolder | None,
    recipe: Recipe,
) -> None:
    """Count rows that are kept apart and used all the same, as the data has them twice.

    Args:
        described: of the tokens, as results.json has it, where the counts are added.
    """
    training, held_out = split_held_out(tokens.open_tokens(), recipe.data.held_out)
    apart = [(described["dev"][name], "trained", rows.open_tokens()) for name, rows in dev.items()]
    if held_out is not None and not recipe.data.sources:  # a mix has counted them
        apart.append((described, "held_out_trained", held_out))
    counts = _count_in_each([rows for *_, rows in apart], training)
    for (record, key, _), count in zip(apart, counts, strict=True):
        record[key] = count
    rows = recipe.calibration.data
    if held_out is not None and rows is not None and rows.text is None:  # no row is a block of text
        [count] = _count_in_each([held_out], calibration_tokens.open_tokens())
        described["held_out_calibrated"] = count


def _count_in_each(sets: Sequence[TokenSet], used: TokenSet) -> list[int]:
    """Count in each of `sets` the examples whose very tokens are among those of `used`."""
    contents = [read_bytes(tokens, range(len(tokens))) for tokens in (*sets, used)]
    return count_shared(contents[:-1], contents[-1])


def _list_notes(
    tokens: TokenFolder | RowFolder,
    dev: dict[str, RowFolder],
    calibration_tokens: TokenFolder | RowFolder | None,
) -> list[str]:
    """List the notes that the manifests have on rows, each under the names of the recipe's fields.

    Manifests of earlier versions have none.
    """
    notes = []
    for made in (tokens, *dev.values()):
        notes += made.manifest.get("notes", ())
    for name, part in tokens.manifest.get("parts", {}).items():  # of a mix
        notes += rename_notes(part, f"data.sources.{name}", MixedRows.model_fields)["notes"]
    if calibration_tokens is not None:
        notes += rename_notes(calibration_tokens.manifest, *CALIBRATION_NAMES)["notes"]
    return list(dict.fromkeys(notes))


def _describe_tokens(tokens: TokenFolder | RowFolder, data: Data) -> dict:
    """Describe the tokens of `data` as results.json has them."""
    manifest = tokens.manifest
    commit = manifest["made_from"]["source"].get("commit")
    return {
        "path": data.path,
        "revision": commit or data.revision,
        "revision_verified": commit is not None,
        "rows": manifest["kept"],
        "cut": manifest["cut"],
        "dropped": manifest["dropped"],
        "tokens_sha256": manifest["tokens_sha256"],
    }


def describe_mixed_tokens(tokens: TokenFolder, data: Data) -> dict:
    """Describe the tokens of a mix as results.json has them, and what it has of each source."""
    manifest = tokens.manifest
    sources = {}
    for name, source in data.list_sources().items():
        part = _describe_tokens(TokenFolder(tokens.folder, manifest["parts"][name]), source)
        part["kept"] = part.pop("rows")
        amount = data.sources[name].model_dump(include=MIXED_FIELDS, exclude_none=True)
        sources[name] = part | manifest["shares"][name] | amount
    return {
        "path": data.label,
        "rows": manifest["kept"],
        "cut": manifest["cut"],
        "dropped": manifest["dropped"],
        "tokens_sha256": manifest["tokens_sha256"],
        "sources": sources,
        "scarce_sources": manifest["scarce_sources"],
        "held_out_trained": manifest["held_out_trained"],
    }


def resolve_dtype(name: str, on_bf16_gpu: bool) -> torch.dtype:
    """Return the dtype that `model.dtype` names.

    Args:
        on_bf16_gpu: see `has_bf16`. auto is bfloat16 there, and float32 elsewhere.
    """
    if name == "auto":
        return torch.bfloat16 if on_bf16_gpu else torch.float32
    return getattr(torch, name)
