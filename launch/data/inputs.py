"""What a run starts from: a local model folder and tokens, checked and prepared once on each node."""

import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launch.config.schema import Recipe
from launch.data.token_cache import TokenFolder, obtain_tokens
from launch.data.token_set import TokenSet, split_held_out
from launch.models.check import (
    CheckedModel,
    check_max_length,
    check_model,
    check_token_ids,
    read_config,
)
from launch.models.files import fetch_model, find_commit, hash_weights, load_tokenizer
from launch.models.identity import hash_config
from launch.runtime.distributed import run_on_each_node
from launch.runtime.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """What `prepare_inputs` found, the same on every rank but for the local path."""

    model: CheckedModel  # in this node's folder
    dtype: torch.dtype  # of the base
    tokens: TokenSet  # to train and calibrate on
    held_out: TokenSet | None  # the last data.held_out examples, which are not in `tokens`
    base: dict  # name, revision and hash of the base model, as results.json has them
    data: dict  # path, counts and hash of the tokens, as results.json has them

    @property
    def model_path(self) -> Path:
        """The base's folder on this node."""
        return self.model.folder


def prepare_inputs(recipe: Recipe, device: torch.device) -> Inputs:
    """Fetch, check and tokenise what `recipe` names. Collective.

    Local rank 0 of every node does the work, so no shared disk is needed. Tokens that a node has
    already are not made again. Every rank maps them into its memory.

    Raises:
        UserError: on every rank, for whatever any node finds wrong, or if the data or the weights
            differ between nodes.
    """
    if recipe.task.has_head:
        raise UserError(f"task.kind: {recipe.task.kind} is not trained yet; set causal")
    nodes = run_on_each_node(lambda: _prepare_node(recipe))
    first = nodes[0]
    for node in nodes:
        if node["data"]["tokens_sha256"] != first["data"]["tokens_sha256"]:
            raise UserError(_describe_difference("data.path", node, first))
        for key in ("weights_sha256", "config_sha256"):
            if node["base"][key] != first["base"][key]:
                raise UserError(_describe_difference("model.name", node, first))
    here = nodes[dist.get_rank()]
    tokens = TokenFolder(Path(here["prepared"]), here["manifest"]).open_tokens()
    training, held_out = split_held_out(tokens, recipe.data.held_out)
    return Inputs(
        model=here["model"],
        dtype=resolve_dtype(recipe.model.dtype, device),
        tokens=training,
        held_out=held_out,
        base=first["base"],
        data=first["data"],
    )


def _describe_difference(field: str, node: dict, first: dict) -> str:
    return f"{field}: its content on {node['host']} is not {first['host']}'s; copy it"


def _prepare_node(recipe: Recipe) -> dict:
    """Prepare this node, and describe the result in values that ranks can exchange."""
    model_path = fetch_model(recipe.model.name, recipe.model.revision)
    check_max_length(recipe.data.max_length, read_config(model_path), recipe.model.name)
    model = check_model(model_path, new_weights=recipe.model.new_weights)
    prepared = obtain_tokens(recipe.data, model_path)
    folder, manifest = prepared
    largest = int(prepared.open_tokens().tokens.max())
    check_token_ids(largest, model.num_embeddings, load_tokenizer(model_path))
    model_commit = find_commit(model_path)
    data_commit = manifest["made_from"]["source"].get("commit")
    return {
        "host": socket.gethostname(),
        "model": model,
        "prepared": str(folder.absolute()),
        "manifest": manifest,
        "base": {
            "name": recipe.model.name,
            "revision": model_commit or recipe.model.revision,
            "revision_verified": model_commit is not None,
            "weights_sha256": hash_weights(model.files),
            "config_sha256": hash_config(model_path),
        },
        "data": {
            "path": recipe.data.path,
            "revision": data_commit or recipe.data.revision,
            "revision_verified": data_commit is not None,
            "rows": manifest["kept"],
            "cut": manifest["cut"],
            "dropped": manifest["dropped"],
            "tokens_sha256": manifest["tokens_sha256"],
        },
    }


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `model.dtype` names; auto is bfloat16 on GPUs and float32 on CPUs."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
