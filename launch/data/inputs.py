"""What a run starts from: a local model folder and tokens, checked and prepared once on every node."""

import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig

from launch.config.schema import Recipe
from launch.data.token_cache import Prepared, obtain
from launch.data.tokenize import TokenSet
from launch.quickstart import base as quickstart
from launch.runtime.distributed import on_each_node
from launch.runtime.errors import UserError
from launch.runtime.model_files import commit_of, fetch_model, weights_hash
from launch.scoring.held_out import split


@dataclass(frozen=True)
class Inputs:
    """The same on every rank."""

    recipe: Recipe  # with local paths in the place of `quickstart`
    model_path: Path
    dtype: torch.dtype
    tokens: TokenSet
    held_out: TokenSet | None  # the last data.held_out rows, which are not in `tokens`
    base: dict  # name, revision and hash of the base model
    data: dict  # path, rows and hash of the tokens, and which rows were cut and dropped


def prepare(recipe: Recipe, device: torch.device) -> Inputs:
    """Resolve, check and tokenise the inputs of `recipe`. Collective.

    Local rank 0 of every node does it, so no shared disk is needed. Tokens that a node has already are not made again;
    every rank maps them into its memory.

    Raises:
        UserError: on every rank, what any node finds wrong; or the nodes' data or weights differ.
    """
    recipe = quickstart.resolve(recipe, device)
    outcomes = on_each_node(lambda: _prepare_node(recipe))
    for other in outcomes:
        for field, part, key in (
            ("data.path", "data", "tokens_sha256"),
            ("model.name", "base", "weights_sha256"),
        ):
            if other[part][key] != outcomes[0][part][key]:
                raise UserError(
                    f"{field}: its content on {other['host']} is not {outcomes[0]['host']}'s; copy it"
                )
    outcome = outcomes[dist.get_rank()]
    tokens = Prepared(Path(outcome["prepared"]), outcome["manifest"]).open()
    training, held_out = split(tokens, recipe.data.held_out)
    return Inputs(
        recipe,
        Path(outcome["model_path"]),
        resolve_dtype(recipe.model.dtype, device),
        training,
        held_out,
        outcomes[0]["base"],
        outcomes[0]["data"],
    )


def _prepare_node(recipe: Recipe) -> dict:
    """What `prepare` hands on."""
    model_path = fetch_model(recipe.model.name, recipe.model.revision)
    check_length(recipe, model_path)
    folder, manifest = obtain(recipe.data, model_path)
    commit = commit_of(model_path)
    rows_commit = manifest["made_from"]["source"].get("commit")
    return {
        "host": socket.gethostname(),
        "model_path": str(model_path),
        "prepared": str(folder.absolute()),
        "manifest": manifest,
        "base": {
            "name": recipe.model.name,
            "revision": commit or recipe.model.revision,
            "revision_verified": commit is not None,
            "weights_sha256": weights_hash(model_path),
        },
        "data": {
            "path": recipe.data.path,
            "revision": rows_commit or recipe.data.revision,
            "revision_verified": rows_commit is not None,
            "rows": manifest["kept"],
            "cut": manifest["cut"],
            "dropped": manifest["dropped"],
            "tokens_sha256": manifest["tokens_sha256"],
        },
    }


def check_length(recipe: Recipe, model_path: Path) -> None:
    """Raises UserError if rows may be longer than the model's context."""
    context = getattr(AutoConfig.from_pretrained(model_path), "max_position_embeddings", None)
    if context and recipe.data.max_length > context:
        raise UserError(
            f"data.max_length: {recipe.data.max_length} is above the {context} positions of {recipe.model.name}; "
            "lower it"
        )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a recipe's `model.dtype`; auto is bfloat16 on GPUs and float32 on CPUs."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
