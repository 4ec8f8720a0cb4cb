"""The first stage of a run: read, check and prepare all that it starts from."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from launch.calibration.batches import check_samples, print_calibration_rows
from launch.config.schema import Recipe
from launch.data.inputs import Inputs, prepare_inputs, resolve_dtype
from launch.data.order import describe_idle_ranks, plan_steps
from launch.data.token_set import TokenSet
from launch.models.check import check_token_ids
from launch.models.files import load_tokenizer
from launch.planning.budget import decide_memory
from launch.planning.decisions import CHECKPOINTING, ENGINE, decide_run
from launch.quickstart.base import resolve_quickstart
from launch.run.results import DataRecord, RunFacts, describe_data
from launch.runtime import watchdog
from launch.runtime.devices import has_bf16
from launch.runtime.distributed import print_rank0, run_on_each_node, run_on_rank0
from launch.runtime.errors import UserError
from launch.scoring.development import check_dev
from launch.scoring.held_out import read_other_text
from launch.scoring.score import check_prompts, read_problems
from launch.stages.records import CALIBRATION, DTYPE, PreparedRun, identify_inputs
from launch.training.checkpoint import Checkpoint, CheckpointStore
from launch.training.kernels import refuse_mixed_lengths, require_kernels
from launch.training.loop import describe_low_rates, describe_unused_epochs
from launch.training.trackers import require_trackers
from launch.training.trainable import check_and_describe_model

DECIDED_AGAIN = (ENGINE, CHECKPOINTING)  # at a resume, by `decide_run`


def prepare_run(recipe: Recipe, name: str, folder: Path, device: torch.device) -> PreparedRun:
    """Read, check and prepare all that a run starts from. Collective.

    Errors in the inputs are raised here, before the model is loaded. Of the quickstart the base is
    pretrained first, if it is not cached.
    """
    started = time.monotonic()
    watchdog.set_phase("reading the inputs")
    model_name = recipe.model.name  # before `quickstart` becomes a path
    settings = recipe.train
    run_on_rank0(lambda: require_trackers(recipe.tracking))
    dtype = resolve_dtype(recipe.model.dtype, has_bf16(device))
    if device.type == "cuda" and recipe.model.dtype == "auto" and dtype == torch.float32:
        print_rank0("model.dtype: auto is float32: these GPUs have no bfloat16 of their own")
    run_on_each_node(lambda: require_kernels(recipe, device, dtype))
    recipe = resolve_quickstart(recipe, device)
    inputs = prepare_inputs(recipe, device)
    check_samples(recipe, inputs, folder / CALIBRATION)
    print_calibration_rows(recipe, inputs)
    tokens = inputs.tokens
    tokenizer = load_tokenizer(inputs.model_path, needs_end=not recipe.task.has_head)
    problems = read_problems(recipe.eval)
    problems_while_training = read_problems(recipe.eval.while_training)
    run_on_rank0(lambda: check_prompts(problems, recipe.eval, tokenizer))
    run_on_rank0(
        lambda: check_prompts(problems_while_training, recipe.eval.while_training, tokenizer)
    )
    measured, other_text_source = _read_measured_sets(recipe, inputs, tokenizer)
    refuse_mixed_lengths(recipe, inputs, measured)
    checkpoints = CheckpointStore(folder, settings.keep, settings.keep_best)
    identity = identify_inputs(inputs, other_text_source)
    saved = run_on_rank0(lambda: find_checkpoint(checkpoints, identity, measured))
    steps = list(
        plan_steps(
            len(tokens), settings.global_batch, settings.epochs, settings.max_steps, settings.seed
        )
    )
    check_dev(inputs.dev, recipe.task)
    print_rank0(run_on_rank0(lambda: check_and_describe_model(inputs.model, recipe.adapter)))
    _print_rows(recipe, inputs, steps)
    recipe, decided = _decide_auto(recipe, inputs, device, folder, saved)
    return PreparedRun(
        name=name,
        model_name=model_name,
        recipe=recipe,
        folder=folder,
        inputs=inputs,
        tokenizer=tokenizer,
        problems=problems,
        problems_while_training=problems_while_training,
        measured=measured,
        other_text_source=other_text_source,
        steps=steps,
        checkpoints=checkpoints,
        saved=saved,
        decided=decided,
        started=started - (0.0 if saved is None else count_earlier_seconds(saved, recipe)),
    )


def count_earlier_seconds(saved: Checkpoint, recipe: Recipe) -> float:
    """Return the seconds of the run's calibration, training and scoring before a checkpoint.

    The calibration at calibration.path is not the run's.
    """
    is_own = recipe.calibration.path is None
    calibration = saved.facts["calibration_seconds"] if is_own else 0.0
    training = saved.history[-1]["seconds"] if saved.history else 0.0
    scoring = sum(metrics.get("scoring_seconds", 0.0) for metrics in saved.history)
    return calibration + training + scoring


def _decide_auto(
    recipe: Recipe, inputs: Inputs, device: torch.device, folder: Path, saved: Checkpoint | None
) -> tuple[Recipe, dict[str, Any]]:
    """Decide the fields that are `auto`; a run that resumes takes what its checkpoint recorded. Collective.

    Returns:
        The recipe with the values, and by the fields' names the values to be recorded.
    """
    if saved is None:
        recipe, decided = decide_run(recipe, inputs, device, {})
        recipe, memory = decide_memory(recipe, inputs, device, folder / CALIBRATION)
        return recipe, decided | memory
    recorded = RunFacts.model_validate(saved.facts).decided
    recipe, decided = decide_run(recipe, inputs, device, recorded)
    # The calibration is done. A field that is no longer auto was not decided.
    kept = {field: value for field, value in recorded.items() if field not in DECIDED_AGAIN}
    return recipe, kept | decided


def _print_rows(recipe: Recipe, inputs: Inputs, steps: list[list[int]]) -> None:
    """Print what is trained on, and what about it and the steps may surprise."""
    tokens, world_size = inputs.tokens, dist.get_world_size()
    dropped = "".join(f"; {count} {reason}" for reason, count in inputs.data["dropped"].items())
    cut = "truncated to" if recipe.task.has_head else "cut at"
    print_rank0(
        f"{len(tokens)} rows ({tokens.num_truncated} {cut} {recipe.data.max_length} tokens, "
        f"{tokens.num_dropped} dropped{dropped}), {len(steps)} steps of "
        f"{recipe.train.global_batch} examples on {world_size} ranks, micro batch "
        f"{recipe.train.micro_batch}"
    )
    # `print_calibration_rows` has said what is calibrated on.
    data = DataRecord.model_validate(inputs.data | {"held_out_calibrated": None})
    for subject, line in describe_data(data):
        print_rank0(f"{subject}: {line}")
    for name, rows in inputs.dev.items():
        print_rank0(f"development: {name}, {len(rows)} rows ({rows.num_truncated} truncated)")
    if tokens.num_special:
        whose = " of the sources" if recipe.data.sources else ""
        print_rank0(
            f"{tokens.num_special} rows{whose} hold text that became special tokens, since this tokenizer "
            "cannot take it for text; launch/prepare.py names the first"
        )
    for line in (
        describe_idle_ranks(steps, world_size),
        describe_unused_epochs(len(tokens), recipe.train),
        describe_low_rates(len(steps), recipe.train),
    ):
        if line is not None:
            print_rank0(line)


def _read_measured_sets(
    recipe: Recipe, inputs: Inputs, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, TokenSet], dict | None]:
    """Return the sets whose loss is measured, by name, and where the other text is from.

    Collective.
    """
    measured = {}
    if inputs.held_out is not None:
        measured["held_out"] = inputs.held_out
    if recipe.eval.other_text is None:
        return measured, None
    path = Path(recipe.eval.other_text).expanduser()
    text, source = run_on_rank0(lambda: read_other_text(path, tokenizer, recipe.data.max_length))
    largest = int(text.tokens.max())
    check_token_ids(largest, inputs.model.num_embeddings, tokenizer, "eval.other_text")
    measured["other_text"] = text
    return measured, source


def find_checkpoint(
    checkpoints: CheckpointStore, identity: Mapping[str, str], measured: Collection[str]
) -> Checkpoint | None:
    """Return the newest intact checkpoint.

    Args:
        identity: of `identify_inputs`.
        measured: names of the sets whose loss is to be measured after training.

    Raises:
        UserError: it is of another base, of other examples or of another dtype; or the loss of a set
            was not measured before training.
    """
    saved = checkpoints.find_newest()
    if saved is None:
        return None
    for field, content in identity.items():
        if saved.facts["inputs"].get(field, content) != content:
            what = content if field == DTYPE else "its content"
            raise UserError(
                f"{field}: {what} is not what this run began with ({saved.folder}); bring that back, "
                "or choose another --output"
            )
    for name in measured:
        if name not in saved.facts["before"]:
            raise UserError(
                f"eval.{name}: was not measured before training ({saved.folder}), so there is nothing "
                "to compare with; leave it out, or choose another --output"
            )
    return saved
