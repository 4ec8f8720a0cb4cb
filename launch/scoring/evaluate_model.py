"""Load a model, with or without an adapter, and score it on all ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import peft
import torch
import torch.distributed as dist
from torch import nn

from astra.adapter import load_adapter, subtract_initial
from astra.saved_adapter import (
    SavedAdapter,
    attach_saved_adapter,
    load_saved_adapter,
    read_saved_adapter,
    write_saved_adapter,
)
from eval.tasks.base import Problem
from launch.config.schema import Eval
from launch.data.inputs import resolve_dtype
from launch.engines import Engine, make_engine
from launch.models.check import CheckedModel, check_model, make_meta_model, read_config
from launch.models.files import (
    fetch_model,
    find_commit,
    hash_adapter,
    hash_weights,
    load_tokenizer,
)
from launch.models.identity import differs, hash_adapter_config, hash_config, hash_tokenizer
from launch.run.provenance import name_dtype
from launch.run.results import Score
from launch.runtime import watchdog
from launch.runtime.devices import has_bf16
from launch.runtime.distributed import print_rank0, run_on_each_node
from launch.runtime.errors import UserError
from launch.scoring.score import score_benchmarks
from launch.training.export import read_adapter_base


class ModelSource(NamedTuple):
    """A model to score."""

    name: str  # hub id or local folder of the base
    revision: str  # of the hub
    adapter: Path | None  # lora/ or adapter/ of a run, or any PEFT adapter
    dtype: str  # as in a recipe's model.dtype
    engine: str  # as in a recipe


def evaluate_model(
    source: ModelSource,
    device: torch.device,
    problems: Mapping[str, list[Problem]],
    settings: Eval,
    folder: Path,
) -> tuple[dict, dict[str, Score]]:
    """Load the model and score it. Collective.

    Returns:
        What the responses depend on besides `settings`, as JSON values, and the base's commit; and
        the scores.

    Raises:
        UserError: there is no such model or adapter, or the adapter is for another base.
    """
    checked, base = _fetch_base(source)
    on_residual, hashes, saved = False, {"adapter_sha256": None}, None
    if source.adapter is not None:
        on_residual, hashes = _identify_adapter(source.adapter, base)
        # Before there is an engine: DeepSpeed would shard the empty model too.
        saved = _read_adapter(checked, source)
    tokenizer = load_tokenizer(checked.folder)
    engine = make_engine(source.engine, device, resolve_dtype(source.dtype, has_bf16(device)))
    watchdog.set_phase("loading the base")
    model = _load_model(checked, saved, on_residual, engine)
    identity = {"base": base, **hashes, "dtype": name_dtype(engine.dtype)}
    with engine.inference_mode(model):
        watchdog.set_phase("scoring", timed=True)
        scores = score_benchmarks(engine, model, tokenizer, problems, settings, folder, identity)
    # No part of the identity: another commit may have the same files, and keeps their responses.
    commit = find_commit(checked.folder)
    noted = {"revision": commit or source.revision, "revision_verified": commit is not None}
    return identity | {"base": base | noted}, scores


def _fetch_base(source: ModelSource) -> tuple[CheckedModel, dict]:
    """Fetch and check the base on every node, since nodes need not share a disk. Collective.

    Returns:
        The base in its folder on this node, and {name, weights_sha256, config_sha256,
        tokenizer_sha256}.
    """

    def fetch() -> tuple[CheckedModel, dict[str, str]]:
        checked = check_model(fetch_model(source.name, source.revision, field="--model"), "--model")
        return checked, {
            "weights_sha256": hash_weights(checked.files),
            "config_sha256": hash_config(checked.folder),
            "tokenizer_sha256": hash_tokenizer(checked.folder, with_config=False),
        }

    fetched = run_on_each_node(fetch)
    hashes = fetched[0][1]
    parts = {"weights_sha256": "weights", "config_sha256": "config.json"}
    for key in hashes:
        if any(found[key] != hashes[key] for _, found in fetched):
            part = parts.get(key, "tokenizer's files")
            raise UserError(
                f"--model: the {part} of {source.name} differ between the nodes; copy one's to all"
            )
    checked, _ = fetched[dist.get_rank()]
    return checked, {"name": source.name, **hashes}


def _identify_adapter(folder: Path, base: dict) -> tuple[bool, dict[str, str | None]]:
    """Check and hash the adapter on every node, since every rank reads its node's. Collective.

    Returns:
        Whether it is for the residual base, and the hashes of its values and its config, and of
        those of ../astra_init where it needs them.
    """

    def identify() -> tuple[bool, dict[str, str | None]]:
        on_residual = _check_adapter(folder, base)
        initial = folder.parent / "astra_init"
        return on_residual, {
            "adapter_sha256": hash_adapter(folder),
            "adapter_config_sha256": hash_adapter_config(folder),
            "astra_init_sha256": hash_adapter(initial) if on_residual else None,
            "astra_init_config_sha256": hash_adapter_config(initial) if on_residual else None,
        }

    found = run_on_each_node(identify)
    if any(other != found[0] for other in found):
        raise UserError(
            f"--adapter: {folder} or its ../astra_init differs between the nodes; copy one's to all"
        )
    return found[0]


def _check_adapter(folder: Path, base: dict) -> bool:
    """Check that the adapter in `folder` fits the base.

    Returns:
        Whether it is for the residual base, which is to be rebuilt from ../astra_init.

    Raises:
        UserError: the folder holds no adapter, or that of another base, or lacks ../astra_init.
    """
    if not (folder / "adapter_config.json").is_file():
        hint = f"; did you mean {folder / 'lora'}?" if (folder / "lora").is_dir() else ""
        raise UserError(f"--adapter: {folder} has no adapter_config.json{hint}")
    made_for = read_adapter_base(folder)
    if made_for is None:
        return False
    if made_for["weights_sha256"] != base["weights_sha256"]:
        raise UserError(
            f"--adapter: {folder} was made for {made_for['name']} with weights "
            f"{made_for['weights_sha256'][:12]}, not for {base['name']} with "
            f"{base['weights_sha256'][:12]}; give that base as --model"
        )
    if differs(made_for.get("config_sha256"), base["config_sha256"]):
        raise UserError(
            f"--adapter: {folder} was made for {made_for['name']} with another config.json than "
            f"{base['name']} has; bring that back"
        )
    if made_for["on"] != "residual":
        return False
    initial = folder.parent / "astra_init"
    if not (initial / "adapter_config.json").is_file():
        raise UserError(f"--adapter: {folder} needs {initial}, which is missing; use lora/ instead")
    return True


def _read_adapter(checked: CheckedModel, source: ModelSource) -> SavedAdapter:
    """Read the adapter and check it against the base, before the base is loaded.

    Raises AstraError.
    """
    empty = make_meta_model(read_config(checked.folder))
    saved = read_saved_adapter(source.adapter, empty, sharded=source.engine != "single")
    if saved.unknown:
        print_rank0(
            f"--adapter: PEFT {peft.__version__} does not know {', '.join(saved.unknown)} of "
            f"{saved.folder}; taken as off, since false or empty"
        )
    return saved


def _load_model(
    checked: CheckedModel, saved: SavedAdapter | None, on_residual: bool, engine: Engine
) -> nn.Module:
    """Load the base with its adapter, for `engine.inference_mode`. Collective."""
    base = engine.load_model(checked)
    watchdog.beat_on_forward(base)
    if saved is None:
        engine.materialize(base)
        return base
    if engine.sharded:
        # Attached before the base is sharded: FSDP2 does not manage parameters that come later.
        model = attach_saved_adapter(base, saved)
        engine.materialize(model)
        write_saved_adapter(model, saved, engine)
    else:
        engine.materialize(base)
        model = load_saved_adapter(base, saved)
    if on_residual:
        initial, scaling = load_adapter(saved.folder.parent / "astra_init")
        subtract_initial(model.get_base_model(), initial, scaling, engine)
    return model
