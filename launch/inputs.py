"""What a run starts from: a local model folder and tokens, checked and prepared once on every node."""

import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from launch import quickstart
from launch.data import TokenSet, read_rows, tokenise
from launch.distributed import on_rank0
from launch.errors import USER_ERRORS, UserError
from launch.files import write_json
from launch.hub import commit_of, fetch_model, load_tokenizer, weights_hash
from launch.measure import split
from launch.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """The same on every rank."""

    recipe: Recipe  # with local paths in the place of `quickstart`
    model_path: Path
    dtype: torch.dtype
    tokens: TokenSet
    held_out: TokenSet | None  # the last data.held_out rows, which are not in `tokens`
    base: dict  # name, revision and hash of the base model
    data: dict  # path, rows and hash of the tokens


def prepare(recipe: Recipe, device: torch.device) -> Inputs:
    """Resolve, check and tokenise the inputs of `recipe`. Collective.

    Local rank 0 of every node does it, and the node's other ranks wait for its file: not in a collective, which could
    time out, and with no shared disk needed.

    Raises:
        UserError: on every rank, what any node finds wrong; or the nodes' data or weights differ.
    """
    recipe = quickstart.resolve(recipe, device)
    launch, owner = on_rank0(lambda: secrets.token_hex(8)), _node_owner()
    scratch = Path(tempfile.gettempdir()) / f"astra-{launch}-{owner}"
    outcome_path = scratch / "outcome.json"
    if owner == dist.get_rank():
        scratch.mkdir(mode=0o700)
        try:
            outcome = _prepare_node(recipe, scratch) | {"error": None}
        except USER_ERRORS as error:
            outcome = {"error": str(error)}
        write_json(outcome_path, outcome)
    while not outcome_path.is_file():
        time.sleep(0.1)
    outcome = json.loads(outcome_path.read_text(encoding="utf-8"))
    outcomes = [outcome] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for other in outcomes:
        if other["error"]:
            raise UserError(other["error"])
        for field, part, key in (("data.path", "data", "tokens_sha256"), ("model.name", "base", "weights_sha256")):
            if other[part][key] != outcomes[0][part][key]:
                raise UserError(f"{field}: its content on {other['host']} is not {outcomes[0]['host']}'s; copy it")
    tensors = load_file(scratch / "tokens.safetensors")
    dist.barrier()
    if owner == dist.get_rank():
        shutil.rmtree(scratch)  # the tensors stay: their file is open
    tokens = TokenSet(**tensors, num_cut=outcome["num_cut"], num_left_out=outcome["num_left_out"])
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


def _node_owner() -> int:
    """The rank that prepares for this rank's node: its local rank 0. Collective."""
    rank, places = dist.get_rank(), [None] * dist.get_world_size()
    dist.all_gather_object(places, (socket.gethostname(), int(os.environ["LOCAL_RANK"])))
    # Hosts may share a name (containers); then the nearest below is the one of the same host.
    owners = [other for other in range(rank + 1) if places[other] == (places[rank][0], 0)]
    return owners[-1] if owners else rank


def _prepare_node(recipe: Recipe, scratch: Path) -> dict:
    """What `prepare` hands on; the tokens go to `scratch`/tokens.safetensors."""
    model_path = fetch_model(recipe.model.name, recipe.model.revision)
    tokenizer = load_tokenizer(model_path)
    context = getattr(AutoConfig.from_pretrained(model_path), "max_position_embeddings", None)
    if context and recipe.data.max_length > context:
        raise UserError(
            f"data.max_length: {recipe.data.max_length} is above the {context} positions of {recipe.model.name}; "
            "lower it"
        )
    tokens = tokenise(read_rows(recipe.data), tokenizer, recipe.data.max_length)
    tensors = {"tokens": tokens.tokens, "offsets": tokens.offsets, "answer_starts": tokens.answer_starts}
    save_file(tensors, scratch / "tokens.safetensors")
    content = hashlib.sha256()
    for tensor in tensors.values():
        content.update(tensor.numpy())
    commit = commit_of(model_path)
    return {
        "host": socket.gethostname(),
        "model_path": str(model_path),
        "num_cut": tokens.num_cut,
        "num_left_out": tokens.num_left_out,
        "base": {
            "name": recipe.model.name,
            "revision": commit or recipe.model.revision,
            "revision_verified": commit is not None,
            "weights_sha256": weights_hash(model_path),
        },
        "data": {
            "path": recipe.data.path,
            "revision": recipe.data.revision,
            "rows": len(tokens),
            "tokens_sha256": content.hexdigest(),
        },
    }


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a recipe's `model.dtype`; auto is bfloat16 on GPUs and float32 on CPUs."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
