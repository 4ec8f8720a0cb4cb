"""What a run starts from: the run folder, a local model folder, and tokens, checked on rank 0."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch
from transformers import AutoConfig

from launch import quickstart
from launch.data import TokenSet, read_rows, tokenise
from launch.distributed import on_rank0
from launch.errors import UserError
from launch.hub import commit_of, fetch_model, load_tokenizer, weights_hash
from launch.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """The same on every rank."""

    recipe: Recipe  # with local paths in the place of `quickstart`
    model_path: Path
    dtype: torch.dtype
    tokens: TokenSet
    base: dict  # name, revision and hash of the base model
    data: dict  # path, rows and hash of the tokens


def open_run(folder: Path, recipe_yaml: str) -> bool:
    """Make the run folder and write recipe.yaml; True if the folder already holds this very run, finished.

    Raises UserError if it holds another run or other files, or cannot be written.
    """
    recipe_path = folder / "recipe.yaml"
    make_folder(folder)
    if recipe_path.is_file() and (folder / "results.json").is_file():
        if recipe_path.read_text() == recipe_yaml:
            return True
        raise UserError(f"--output: {folder} holds a finished run of another recipe; choose another folder")
    if not recipe_path.is_file() and any(folder.iterdir()):
        raise UserError(f"--output: {folder} holds other files; choose an empty or new folder")
    recipe_path.write_text(recipe_yaml)
    return False


def make_folder(folder: Path) -> None:
    """Make an output folder, if need be. Raises UserError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output: cannot write {folder}: {error.strerror}") from None


def prepare(recipe: Recipe, device: torch.device) -> Inputs:
    """Resolve, check and tokenise the inputs of `recipe`; rank 0 does it and hands the result on. Collective."""
    wanted = (recipe.model.name, recipe.model.revision)
    recipe = quickstart.resolve(recipe, device)
    model_path = on_rank0(lambda: fetch_model(recipe.model.name, recipe.model.revision))
    if not model_path.is_dir():  # a node that does not share rank 0's disk
        model_path = fetch_model(recipe.model.name, recipe.model.revision)

    def read() -> tuple[TokenSet, dict, dict]:
        tokenizer = load_tokenizer(model_path)
        context = getattr(AutoConfig.from_pretrained(model_path), "max_position_embeddings", None)
        if context and recipe.data.max_length > context:
            raise UserError(
                f"data.max_length: {recipe.data.max_length} is above the {context} positions of {recipe.model.name}; "
                "lower it"
            )
        tokens = tokenise(read_rows(recipe.data), tokenizer, recipe.data.max_length)
        commit = commit_of(model_path)
        base = {
            "name": recipe.model.name,
            "revision": commit or wanted[1],
            "revision_verified": commit is not None,
            "weights_sha256": weights_hash(model_path),
        }
        data = {
            "path": recipe.data.path,
            "revision": recipe.data.revision,
            "rows": len(tokens),
            "tokens_sha256": hashlib.sha256(tokens.tokens.numpy().tobytes()).hexdigest(),
        }
        return tokens, base, data

    tokens, base, data = on_rank0(read)
    return Inputs(recipe, model_path, resolve_dtype(recipe.model.dtype, device), tokens, base, data)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a recipe's `model.dtype`; auto is bfloat16 on GPUs and float32 on CPUs."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
