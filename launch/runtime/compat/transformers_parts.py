"""Private parts of transformers: what a model says of itself, and how its files are loaded."""

import copy
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    masking_utils,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.distributed.checkpoint import is_sharded_checkpoint
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files

from astra.eigen import make_generator


def list_layer_classes(model: PreTrainedModel) -> Collection[str]:
    """Return the class names of the model's layers, the units of sharding and compiling.

    transformers has the names for device maps, which must not split such a module. Models that have
    none, such as DeBERTa, are split by the longest list of modules.
    huggingface/transformers#24568 asked to shard by them; no report for a public name found.
    """
    if model._no_split_modules:
        return model._no_split_modules
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=[])
    return {type(layer).__name__ for layer in longest}


def read_attention(config: PretrainedConfig) -> str:
    """Return which attention kernels a loaded model uses, such as `sdpa`.

    `set_attn_implementation` is public, but there is no function that reads it.
    """
    return config._attn_implementation


@contextmanager
def without_packing_check(active: bool) -> Iterator[None]:
    """Within the context, let transformers take every sequence for a single one, if `active`.

    It would look for packed ones in the position ids, on the device, and the host would wait for a
    GPU in every forward pass (masking_utils.find_packed_sequence_indices, transformers 5.23). There
    is no public way to say that there are none.

    Args:
        active: nothing is packed, and position ids are left to the model; then the function would
            return None too.
    """
    own = masking_utils.find_packed_sequence_indices
    if active:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


# What loading a model's files would do


class ReadingStep(NamedTuple):
    """How transformers makes one parameter or buffer, or several, of tensors in the files."""

    target: str  # the first that it makes
    is_parameter: bool
    sources: dict[str, list[str]]  # pattern of a transform -> names in the files, in order
    transform: WeightConverter | None  # None: the tensor is taken as it is

    def list_keys(self) -> list[str]:
        """Return the names in the files."""
        return list(chain.from_iterable(self.sources.values()))


class LoadingReport(NamedTuple):
    """What transformers would find wrong with the files."""

    missing: set[str]  # parameters and persistent buffers that no file has, and no tie gives
    unexpected: set[str]  # in the files, renamed as transformers does, without those it ignores
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> shapes found, wanted
    failed: dict[str, str]  # target -> why its tensors cannot be converted


def resolve_weight_files(
    folder: Path, config: PretrainedConfig
) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files that `from_pretrained` reads for the model in `folder`, and its index.

    It has no public function that names them.

    Returns:
        The files, and tensor -> file name; None where no index is read.

    Raises:
        OSError: there are no weights.
        ValueError, KeyError, TypeError, AttributeError: the index has another form.
    """
    if is_sharded_checkpoint(folder):
        raise ValueError("files of a distributed checkpoint, shard-*-model-*, come before it")
    names, metadata = _get_resolved_checkpoint_files(
        str(folder),
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent=None,
        is_remote_code=False,
        transformers_explicit_filename=getattr(config, "transformers_weights", None),
        download_kwargs={"local_files_only": True},
    )
    paths = [Path(name) for name in names]
    extra = [folder / name for name in type(config).extra_files if (folder / name).is_file()]
    return [*paths, *extra], metadata and dict(metadata["weight_map"])


def choose_auto_class(config: PretrainedConfig) -> type:
    """Return transformers' class that makes the model of a config as launch.models gives it.

    A config with a `problem_type` is one of launch.models.head. Nothing here is private: `make_meta_model`
    needs it.
    """
    return AutoModelForSequenceClassification if config.problem_type else AutoModelForCausalLM


def make_meta_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make the model of `config` without storage, outside of any ZeRO context.

    It is a causal language model or, by `choose_auto_class`, one with a new head. It has the dtype
    of the config, unless `dtype` is given.

    While an HfDeepSpeedConfig is alive, `from_config` shards what it makes.
    """
    with without_zero3(), torch.device("meta"):
        auto_class = choose_auto_class(config)
        return auto_class.from_config(config, **({"dtype": dtype} if dtype else {}))


@contextmanager
def without_zero3() -> Iterator[None]:
    """Within the context, hide a live HfDeepSpeedConfig from transformers.

    It has public functions that set the config and unset it, but none that returns it.
    """
    found = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = found


def get_ties(model: PreTrainedModel) -> dict[str, str]:
    """Return parameter -> the parameter it is tied to by the config.

    `all_tied_weights_keys` is undocumented.
    """
    return dict(model.all_tied_weights_keys)


def report_loading(
    model: PreTrainedModel, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> LoadingReport:
    """Load names, dtypes and shapes into a model without storage, and report what does not fit.

    These are the steps of `from_pretrained` (transformers 5.23, modeling_utils.py), which would read
    the values, draw what is missing at random, and log its report. It reports less than is wanted
    here: some models' missing parameters are on a list of ignored ones.

    Args:
        model: made on the meta device; its parameters are replaced.
        stored: name in the files -> dtype and shape.
    """
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in stored.items()
    }
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    settings = LoadStateDictConfig(
        device_map={"": "meta"},
        dtype=model.dtype,
        weight_mapping=get_model_conversion_mapping(model),
    )
    info, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    missing = parameters & info.missing_keys
    model._adjust_missing_and_unexpected_keys(info)
    mismatched = {}
    for name, found, wanted in info.mismatched_keys:
        mismatched[name] = (tuple(found), tuple(wanted))
    failed = {}
    for name, text in info.conversion_errors.items():
        failed[name] = _find_error_line(text)
    return LoadingReport(missing | info.missing_keys, info.unexpected_keys, mismatched, failed)


def _find_error_line(text: str) -> str:
    """Return the line of a traceback that names the exception."""
    lines = [line for line in text.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return lines[0] if lines else text.splitlines()[0]


def plan_reading(model: PreTrainedModel, keys: Iterable[str]) -> list[ReadingStep]:
    """Return the steps in which transformers makes the model's tensors of those in the files.

    This is the first half of `convert_and_load_state_dict_in_model` (transformers 5.23,
    core_model_loading.py), which reads the values of all parameters at once and whole: FSDP2 ranks
    are to read one after the other.

    Args:
        keys: names in the files. Those that the model has no place for are in no step.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    by_pattern = {}
    for converter in converters:
        by_pattern |= dict.fromkeys(converter.source_patterns, converter)
    wanted = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = model.base_model_prefix
    steps: dict[str, ReadingStep] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if target not in wanted and key in wanted:
            target, pattern = rename_source_key(key, [], [], prefix, wanted)
        if target in wanted:
            transform = None if pattern is None else by_pattern[pattern]
            new = ReadingStep(target, target in parameters, {}, transform)
            step = steps.setdefault(target, new)
            step.sources.setdefault(pattern or key, []).append(key)
    return list(steps.values())


def convert_tensors(
    step: ReadingStep, model: PreTrainedModel, read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Read the tensors of a step and return the parameters that transformers makes of them.

    Its `convert` needs a transform that has collected them.

    Args:
        model: with the names and the config of the one that is loaded.
        read: name in the files -> its values.
    """
    if step.transform is None:
        (key,) = step.list_keys()
        return {step.target: read(key)}
    transform = copy.deepcopy(step.transform)
    for pattern, keys in step.sources.items():
        for key in keys:
            # Read when they are needed.
            transform.add_tensor(step.target, key, pattern, functools.partial(read, key))
    made = transform.convert(step.target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def list_stacked_numbers(step: ReadingStep) -> list[list[int]]:
    """Return the numbers of the modules whose tensors are stacked into one, pattern by pattern.

    They are those of experts: each is a file's tensor, and the model has one for all. What a transform
    does is undocumented.
    """
    operations = step.transform.operations if step.transform is not None else []
    if not any(isinstance(operation, MergeModulelist) for operation in operations):
        return []
    stacked = []
    for keys in step.sources.values():
        columns = zip(*(key.split(".") for key in keys), strict=True)
        for column in columns:
            if len(set(column)) > 1 and all(part.isdigit() for part in column):
                stacked.append([int(part) for part in column])
    return stacked


def list_kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Return the names of the parameters and buffers that transformers keeps in fp32.

    `from_pretrained` does, `from_config` does not.

    Args:
        dtype: of the others.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    kept, _, _ = build_glob_alternation(list(plan))
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, _ in (*parameters, *model.named_buffers(remove_duplicate=False))]
    return {name for name in names if kept.search(name)}


def keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert to fp32 the parameters and buffers of `model` that transformers keeps in fp32.

    See `list_kept_in_fp32`.

    Args:
        model: its parameters have no storage yet.
        dtype: of the others.
    """
    for name in list_kept_in_fp32(model, dtype):
        prefix, _, attribute = name.rpartition(".")
        module = model.get_submodule(prefix)
        value = getattr(module, attribute)
        if isinstance(value, nn.Parameter):
            value.data = value.data.float()
        elif value.is_floating_point():
            module._buffers[attribute] = value.float()


def draw_parameter(model: PreTrainedModel, name: str, seed: int) -> Tensor:
    """Draw the values of one parameter as transformers initialises its module, fp32, on the CPU.

    `_init_weights` is private; public functions initialise whole models.

    Args:
        model: without storage.
        seed: decides the values together with `name`.
    """
    prefix, _, attribute = name.rpartition(".")
    module = model.get_submodule(prefix)
    for own, parameter in module.named_parameters(recurse=False):
        values = torch.zeros(parameter.shape)  # what `_init_weights` does not know stays 0
        module._parameters[own] = nn.Parameter(values, requires_grad=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(make_generator(seed, name).initial_seed())
        model._init_weights(module)
    return module.get_parameter(attribute).detach()
