"""Check a base model's folder before anything is computed.

transformers draws every weight that the files lack at random, with no more than a warning, and its
loaders for DeepSpeed do not even warn. So every command that loads a model calls `check_model`
first, and every engine loads the `CheckedModel` that it returns.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from astra.adapter import ADAPTER_CONFIG
from launch.models.head import (
    Head,
    find_head_names,
    find_outer_names,
    is_encoder,
    is_of_other_head,
    set_head,
)
from launch.models.weight_files import (
    ModelFault,
    StoredTensor,
    WeightFiles,
    find_weight_files,
    naming_model,
)
from launch.runtime.compat import transformers_parts
from launch.runtime.compat.deepspeed_parts import get_full_shape
from launch.runtime.compat.transformers_parts import (
    ReadingStep,
    convert_tensors,
    draw_parameter,
    get_ties,
    list_stacked_numbers,
    plan_reading,
    report_loading,
)
from launch.runtime.errors import UserError

# Dtypes in the words of safetensors. A parameter in any but the first four is quantised.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
QUANTIZATION = ("quantization_config", "compression_config")  # in a config, at any depth
# The names of a config for the number of positions; most have the first, also as an alias.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Kinds of models whose first position is the padding token's id + 1.
SHIFTED_POSITIONS = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
ROWS = 4096  # of two tied matrices that are compared at once


@dataclass(frozen=True)
class CheckedModel:
    """A model whose files hold every weight of its architecture, and nothing else.

    With a head, every weight but the head's, and of another head at most.
    """

    folder: Path
    files: tuple[Path, ...]  # that hold the weights; others in the folder are not read
    new_weights: tuple[str, ...]  # parameters that the files lack, which the run draws
    num_embeddings: int  # rows of the input embedding: token ids are below it
    head: Head | None = None  # that the run puts on the base; None for a causal language model
    unused: tuple[str, ...] = ()  # tensors in the files that are another head's
    # In which the files hold parameters, in the words of safetensors.
    dtypes: frozenset[str] = frozenset()

    @property
    def head_parameters(self) -> tuple[str, ...]:
        """The names of the new head's parameters; empty without one."""
        return () if self.head is None else self.new_weights


def check_model(
    folder: Path,
    field: str = "model.name",
    new_weights: Sequence[str] = (),
    head: Head | None = None,
    head_is_stored: bool = False,
) -> CheckedModel:
    """Check that transformers would find every weight of the model in `folder`, and no others.

    transformers loads the files' names, dtypes and shapes into the architecture on the meta device,
    with its own key conversions, ties and ignored keys, so a model of any size takes no memory.

    Args:
        field: what a message begins with, the recipe field or option that names the folder.
        new_weights: parameters that are to be missing: the run draws them.
        head: the new head of a model for sequence classification, whose parameters are to be
            missing.
        head_is_stored: whether the files are to hold the head, as a run has trained and exported it.

    Raises:
        UserError: whatever would make a run train something else than the files hold.
    """
    config = read_config(folder, field, head)
    with naming_model(field):
        if (folder / ADAPTER_CONFIG).is_file():
            raise ModelFault(
                f"{folder} also holds an adapter ({ADAPTER_CONFIG}), which transformers would load "
                "with the model; move it to a folder of its own"
            )
        weights = find_weight_files(folder, config)
        tensors = weights.read_headers()
        model = make_meta_model(config, field)
        new_head = None if head_is_stored else head
        can_draw = field == "model.name"
        loading = _check_loading(model, weights, tensors, new_weights, new_head, can_draw)
    return CheckedModel(
        folder=folder,
        files=weights.files,
        new_weights=loading.drawn,
        num_embeddings=get_num_rows(model),
        head=head,
        unused=loading.unused,
        dtypes=loading.dtypes,
    )


def read_config(
    folder: Path, field: str = "model.name", head: Head | None = None
) -> PretrainedConfig:
    """Read the config in a model's folder, for a causal language model or for one with `head`.

    Raises:
        UserError: it cannot be read, or the model is quantised.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 (a config's own code may raise anything)
        raise UserError(
            f"{field}: cannot use the config.json of {folder}: {_shorten(error)}"
        ) from None
    refuse_quantised(config, field)
    set_head(config, head)
    return config


def refuse_quantised(config: PretrainedConfig, field: str = "model.name") -> None:
    """Raise UserError if the model is quantised."""
    found = next(_find_quantization(config.to_dict()), None)
    if found is None:
        return
    place, settings = found
    method = settings.get("quant_method", "") if isinstance(settings, dict) else ""
    raise UserError(
        f"{field}: the base is quantised ({place} {method}".rstrip() + " in config.json), which is "
        "not supported; give its weights in bfloat16, float16 or float32"
    )


def make_meta_model(config: PretrainedConfig, field: str = "model.name") -> PreTrainedModel:
    """Make the model of a config from `read_config` without storage.

    Raises:
        UserError: transformers has none for this config; or it is an encoder's, without a head.
    """
    if config.problem_type is None and is_encoder(config):
        remedy = "choose a decoder; a run with `task` is scored while it trains"
        if field == "model.name":
            remedy = "set task.kind to classification or regression, or choose a decoder"
        raise UserError(
            f"{field}: {config.model_type} is an encoder, whose tokens see those that follow, so it "
            f"cannot predict them; {remedy}"
        )
    kind = "model for sequence classification" if config.problem_type else "causal language model"
    try:
        return transformers_parts.make_meta_model(config)
    except Exception as error:  # noqa: BLE001 (a model's own code may raise anything)
        raise UserError(
            f"{field}: transformers cannot make a {kind} of this config.json: {_shorten(error)}"
        ) from None


def get_num_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions a model has, None where there is no limit.

    Models with images or sounds have them in the config of their text part.
    """
    for part in (config.get_text_config(decoder=True), config):
        for name in POSITIONS:
            value = getattr(part, name, None)
            if isinstance(value, int) and value > 0:
                # RoBERTa and its kin count positions from behind the padding token's id.
                shifted = config.model_type in SHIFTED_POSITIONS
                return value - (config.pad_token_id or 0) - 1 if shifted else value
    return None


def check_max_length(max_length: int, config: PretrainedConfig, name: str) -> None:
    """Raise UserError if rows of `max_length` tokens may be longer than the model's context."""
    context = get_num_positions(config)
    if context is not None and max_length > context:
        raise UserError(
            f"data.max_length: {max_length} is above the {context} positions of {name}; lower it"
        )


def check_token_ids(
    largest: int,
    num_embeddings: int,
    tokenizer: PreTrainedTokenizerBase,
    field: str = "model.name",
) -> None:
    """Raise UserError if `largest`, the largest id of some tokens, has no row of the embedding."""
    if largest < num_embeddings:
        return
    token = tokenizer.convert_ids_to_tokens(largest)
    raise UserError(
        f"{field}: the tokenizer gives token {largest} ({token!r}), but the embedding has "
        f"{num_embeddings} rows; remove that token from the tokenizer, or enlarge the base with "
        "resize_token_embeddings and save it"
    )


def get_num_rows(model: nn.Module) -> int:
    """Return the number of rows of a model's input embedding, also where it is sharded."""
    return get_full_shape(model.get_input_embeddings().weight)[0]


def draw_weight(folder: Path, name: str, seed: int, head: Head | None = None) -> Tensor:
    """Draw the values of a parameter that the files lack, fp32, on the CPU.

    They have the distribution that transformers gives to this module, and depend on nothing but
    (seed, name) and the config: every engine and world size has the same.
    """
    return draw_parameter(make_meta_model(read_config(folder, head=head)), name, seed)


def get_num_embeddings(config: PretrainedConfig) -> int:
    """Return the number of token ids that the input embedding has rows for, by the config alone."""
    return get_num_rows(make_meta_model(config))


class Loading(NamedTuple):
    """What loading a model's files leaves to the run, and what it takes of them."""

    drawn: tuple[str, ...]  # parameters that the run draws
    unused: tuple[str, ...]  # tensors of other heads
    dtypes: frozenset[str]  # of the parameters that are used


def _check_loading(
    model: PreTrainedModel,
    weights: WeightFiles,
    tensors: Mapping[str, StoredTensor],
    new_weights: Sequence[str],
    head: Head | None,
    can_draw: bool,
) -> Loading:
    """Check that loading `tensors` into `model` leaves nothing over and nothing unset.

    Args:
        can_draw: whether a recipe may declare further parameters as new.

    Raises:
        ModelFault: it does not.
        UserError: a weight that is declared as new is none.
    """
    steps = plan_reading(model, tensors)
    dtypes = _read_dtypes(steps, tensors)
    forms = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in TORCH_DTYPES:
            raise ModelFault(f"{name} has the dtype {tensor.dtype}, which is not supported")
        forms[name] = (TORCH_DTYPES[tensor.dtype], tensor.shape)
    report = report_loading(model, forms)
    if report.failed:
        name, reason = next(iter(report.failed.items()))
        raise ModelFault(
            f"the files' tensors for {name}{_count_others(report.failed)} do not fit "
            f"together: {reason}; get the whole model again"
        )
    drawn, unused = tuple(new_weights), ()
    if head is not None:
        drawn = find_head_names(model, report.missing)
        unused = tuple(sorted(n for n in report.unexpected if is_of_other_head(n, model)))
        _require_new_head(model, report.missing)
    missing, unexpected = report.missing - set(drawn), report.unexpected - set(unused)
    if missing:
        raise ModelFault(_describe_missing(missing, unexpected, can_draw))
    if unexpected:
        raise ModelFault(
            f"the files hold {_pick(unexpected)}{_count_others(unexpected)}, "
            f"for which {type(model).__name__} of this config.json has no place; correct "
            "config.json, or remove it from the files"
        )
    if report.mismatched:
        name, (found, wanted) = next(iter(sorted(report.mismatched.items())))
        raise ModelFault(
            f"{name}{_count_others(report.mismatched)} has the shape {found} in the "
            f"files, and {wanted} by config.json; one of them is of another model"
        )
    used: set[str] = set()
    for step in steps:
        _check_numbering(step)
        used.update(step.list_keys())
    _check_new_weights(model, drawn, report.missing)
    weights.check_index(tensors, tensors.keys() - used)
    _check_ties(model, steps, tensors)
    return Loading(drawn, unused, dtypes)


def _require_new_head(model: PreTrainedModel, missing: Collection[str]) -> None:
    """Raise ModelFault if the files hold a head, or a part of one, for sequence classification."""
    for name in find_outer_names(model):
        if name not in missing:
            raise ModelFault(
                f"the files hold {name}, a head whose outputs may be others than task.labels; the "
                "run draws a new head: remove it from the files"
            )


def _read_dtypes(
    steps: Sequence[ReadingStep], tensors: Mapping[str, StoredTensor]
) -> frozenset[str]:
    """Return the dtypes of the parameters. Raises ModelFault if one is stored in a quantised form."""
    dtypes = set()
    for step in steps:
        if not step.is_parameter:
            continue
        for key in step.list_keys():
            if tensors[key].dtype not in FLOAT_DTYPES:
                raise ModelFault(
                    f"{key} is stored as {tensors[key].dtype}, a quantised form, which is "
                    "not supported; give its weights in bfloat16, float16 or float32"
                )
            dtypes.add(tensors[key].dtype)
    return frozenset(dtypes)


def _describe_missing(missing: Collection[str], unexpected: Collection[str], can_draw: bool) -> str:
    """Say which weights are missing, and what to do."""
    text = f"the files lack {_pick(missing)}{_count_others(missing)}"
    if unexpected:
        text += (
            f" and hold {_pick(unexpected)}{_count_others(unexpected)}, which is not of this model"
        )
    if can_draw and len(missing) == 1:
        return (
            f"{text}; get the whole model, or, if it is to be trained from nothing, set "
            f"model.new_weights=[{_pick(missing)}] with adapter.method=full"
        )
    return f"{text}; get the whole model, with the config.json that belongs to these files"


def _check_numbering(step: ReadingStep) -> None:
    """Raise ModelFault if one of the modules that are stacked into one tensor is missing.

    transformers stacks what is there, in order: with another one too many at the end, the shape
    would be right and the experts the wrong ones.
    """
    for numbers in list_stacked_numbers(step):
        if numbers != list(range(len(numbers))):
            lacking = next(i for i, number in enumerate(numbers) if i != number)
            raise ModelFault(
                f"the files lack number {lacking} of the tensors that are stacked into "
                f"{step.target}; get the whole model"
            )


def _check_new_weights(
    model: PreTrainedModel, new_weights: Sequence[str], missing: Collection[str]
) -> None:
    """Raise UserError if a weight that is declared as new is none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in new_weights:
        if name not in parameters:
            raise UserError(
                f"model.new_weights: {name} is no parameter of {type(model).__name__}; give whole "
                "names, such as lm_head.weight"
            )
        if name not in missing:
            raise UserError(
                f"model.new_weights: {name} is in the model's files, or tied to a weight that is; "
                "leave it out"
            )


def _check_ties(
    model: PreTrainedModel,
    steps: Sequence[ReadingStep],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Raise ModelFault if two parameters that the config ties are both in the files, and differ.

    transformers then leaves them untied, but not with DeepSpeed's stage 3.
    """
    stored = {step.target: step for step in steps}
    for name, other in get_ties(model).items():
        if name not in stored or other not in stored:
            continue
        if not _are_equal(model, stored[name], stored[other], tensors):
            raise ModelFault(
                f"config.json ties {name} to {other}, but the files hold both, with other "
                "values; set tie_word_embeddings to false in config.json to train two matrices, or "
                f"remove {name} from the files"
            )


def _are_equal(
    model: PreTrainedModel,
    first: ReadingStep,
    second: ReadingStep,
    tensors: Mapping[str, StoredTensor],
) -> bool:
    """Compare the values of two parameters, a few rows at a time."""
    if first.transform is not None or second.transform is not None:
        whole = [_convert(model, step, tensors)[step.target] for step in (first, second)]
        return torch.equal(*(value.double() for value in whole))
    (key,), (other_key,) = first.list_keys(), second.list_keys()
    if tensors[key].shape != tensors[other_key].shape:
        return False
    with (
        safe_open(tensors[key].file, framework="pt") as file,
        safe_open(tensors[other_key].file, framework="pt") as other_file,
    ):
        rows, other_rows = file.get_slice(key), other_file.get_slice(other_key)
        if not tensors[key].shape:
            return torch.equal(rows[...].double(), other_rows[...].double())
        for start in range(0, tensors[key].shape[0], ROWS):
            part = slice(start, start + ROWS)
            if not torch.equal(rows[part].double(), other_rows[part].double()):
                return False
    return True


def _convert(
    model: PreTrainedModel, step: ReadingStep, tensors: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    """Read the tensors of one step and return the parameters made of them."""

    def read(key: str) -> Tensor:
        with safe_open(tensors[key].file, framework="pt") as file:
            return file.get_tensor(key)

    return convert_tensors(step, model, read)


def _find_quantization(config: dict, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the settings of a quantisation anywhere in a config."""
    for name, value in config.items():
        if name in QUANTIZATION and value is not None:
            yield f"{path}{name}", value
        elif isinstance(value, dict):
            yield from _find_quantization(value, f"{path}{name}.")


def _pick(names: Collection[str]) -> str:
    """Return the first name, in the order of the alphabet."""
    return min(names)


def _count_others(names: Collection) -> str:
    """Say how many names there are beside the one that is given."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _shorten(error: Exception) -> str:
    """Return an exception's first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
