"""The records that the stages of a run hand on to each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.tasks.base import Problem
from launch.config.schema import Recipe
from launch.data.inputs import Inputs
from launch.data.token_set import TokenSet
from launch.engines import Engine
from launch.run.provenance import name_dtype
from launch.run.results import Prediction, Score
from launch.training.checkpoint import Checkpoint, CheckpointStore

CALIBRATION = "calibration"  # folder in the run folder
WHILE_TRAINING = "while_training"  # the same, of responses: step-<n>/generations.jsonl
# Keys of identify_inputs that earlier checkpoints lack.
CONFIG, DTYPE, OTHER_TEXT = "config.json of model.name", "model.dtype", "eval.other_text"


@dataclass(frozen=True)
class PreparedRun:
    """What the first stage reads and decides.

    It is the same on every rank, except for the folder in inputs.model, which is local to a node.
    """

    name: str  # the recipe's name
    model_name: str  # the base as the recipe names it
    recipe: Recipe  # with local paths in the place of `quickstart`
    folder: Path  # the run folder
    inputs: Inputs  # the base's folder and the training examples
    tokenizer: PreTrainedTokenizerBase
    problems: dict[str, list[Problem]]  # benchmark -> its questions
    problems_while_training: dict[str, list[Problem]]  # the same of eval.every_suites
    measured: dict[str, TokenSet]  # sets whose loss is measured before and after training
    other_text_source: dict | None  # path and hash of the text on which forgetting is measured
    steps: list[list[int]]  # for each optimiser step, its examples, over all ranks
    checkpoints: CheckpointStore
    saved: Checkpoint | None  # the checkpoint to resume from
    decided: dict[str, Any]  # recipe field that was `auto` -> what was decided
    # time.monotonic() at this start, minus the seconds that earlier starts spent calibrating,
    # training and scoring.
    started: float


@dataclass(frozen=True)
class RunModel:
    """The model that is trained, in its engine."""

    engine: Engine
    base: PreTrainedModel
    model: nn.Module  # the base with adapters, or the base itself
    lora_layers: dict[str, LoraLayer]  # module name -> PEFT layer; empty if all is trained


@dataclass(frozen=True)
class BaseMeasurements:
    """What is measured on the untouched base, before it is initialised."""

    calibration: Path | None  # folder of the calibration; None where the method needs none
    logits: Tensor  # of one training example of this rank
    before: dict[str, Prediction]  # measured set -> the base's prediction
    baseline: dict[str, Score]  # benchmark -> the base's score


def identify_inputs(inputs: Inputs, other_text_source: dict | None) -> dict[str, str]:
    """Return what a run's numbers depend on beside its recipe, by the fields that name it.

    Returns:
        Hashes of the base, its config, the examples and the other text; and the dtype, which
        model.dtype may leave to the device.
    """
    dev = {
        f"task.dev, {name}": rows["tokens_sha256"]
        for name, rows in inputs.data.get("dev", {}).items()
    }
    other_text = {} if other_text_source is None else {OTHER_TEXT: other_text_source["sha256"]}
    return {
        DTYPE: name_dtype(inputs.dtype),
        "model.name": inputs.base["weights_sha256"],
        CONFIG: inputs.base["config_sha256"],
        "data.sources" if "sources" in inputs.data else "data.path": inputs.data["tokens_sha256"],
        **dev,
        **other_text,
    }
