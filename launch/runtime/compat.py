"""Every touch of a private part of torch, DeepSpeed or transformers: one function each.

A private part may change with any release, without a word. The versions in `TESTED` are those that
the tests were run with; `warn_on_other_versions` tells where others are installed. Each docstring
says why no public part will do, and which upstream report, as of 2026-11, would make the function
unnecessary.
"""

import copy
import functools
import importlib.metadata
import os
import re
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
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
from launch.runtime.errors import RankError

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "peft": "0.21.2"}
_GLOO_INIT = dist.ProcessGroupGloo.__init__


# Versions


@functools.cache
def warn_on_other_versions() -> None:
    """Print one line on rank 0 if a package's version is not the tested one; once in a process.

    A build's own suffix, as in 2.13.0+cpu, does not count.
    """
    if dist.get_rank() != 0:
        return
    others = []
    for package, tested in TESTED.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # whoever needs it will say so
        if installed.partition("+")[0] != tested:
            others.append(f"{package} {installed} (tested: {tested})")
    if others:
        print(
            "warning: private parts of these packages are used and may differ: "
            + ", ".join(others),
            flush=True,
        )


# torch.distributed


def run_gloo_in_one_thread(timeout: timedelta) -> None:
    """Run the collectives of every gloo group that is made from now on in one thread.

    torch gives each group two threads. Both write the name of the collective they have finished
    into one string of the group, without a lock (ProcessGroupGloo::runLoop, torch 2.13). A name
    long enough to lie on the heap, as that of DTensor's gathers, is freed twice when two
    collectives finish together. A rank died of that now and then; with 16 gathers at once it did
    within seconds, again and again. torch has no public option for the number of threads.

    No upstream report found (2026-11).

    Args:
        timeout: of the collectives of groups that are made without one.
    """

    def init_group(
        self: dist.ProcessGroupGloo,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta = timeout,
    ) -> None:
        _GLOO_INIT(self, store, rank, size, _make_gloo_options(rank, timeout))

    dist.ProcessGroupGloo.__init__ = init_group


def _make_gloo_options(rank: int, timeout: timedelta) -> Any:
    """Make the options of a gloo group with one thread.

    Raises:
        RankError: this machine has no network of a name in GLOO_SOCKET_IFNAME.
    """
    gloo, networks = dist.ProcessGroupGloo, os.environ.get("GLOO_SOCKET_IFNAME")
    options = gloo._Options()
    options._threads, options._timeout = 1, timeout
    if not networks:
        options._devices = [gloo.create_default_device()]
        return options
    try:
        options._devices = [gloo.create_device(interface=name) for name in networks.split(",")]
    except RuntimeError:
        raise RankError(
            f"rank {rank}: GLOO_SOCKET_IFNAME: {socket.gethostname()} has no network {networks} "
            "with an address"
        ) from None
    return options


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set the timeout of a process group that a library has made with torch's default.

    torch 2.13 has no public function for it; pytorch/pytorch#187387 adds
    torch.distributed.set_timeout.
    """
    _set_pg_timeout(timeout, group)


# torch.nn and torch.compile


def compute_norms(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute the 2-norm of each tensor, scalars, in one kernel for many of them on a GPU.

    `torch.nn.utils.get_total_norm` calls the same function, but returns one norm of all. No upstream
    report found (2026-11).
    """
    return torch._foreach_norm(tensors, 2.0)


def undo_compile(module: nn.Module) -> None:
    """Run `module` as it was written again, after `module.compile()`, which has no opposite.

    No upstream report found (2026-11).
    """
    module._compiled_call_impl = None


@contextmanager
def run_uncompiled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, run `modules` as they were written; after it, what was compiled before."""
    compiled = [module._compiled_call_impl for module in modules]
    for module in modules:
        undo_compile(module)
    try:
        yield
    finally:
        for module, call in zip(modules, compiled, strict=True):
            module._compiled_call_impl = call


# torch's fake tensors and dispatch, for launch.planning

# Attention on CPUs is not among the operations whose arithmetic torch 2.13 counts:
# pytorch/pytorch#195460, mended in pytorch/pytorch#195801.
_ATEN = torch.ops.aten
FLOPS = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""ATen operation -> function of its arguments that returns its floating-point operations."""


class DispatchMode(TorchDispatchMode):
    """A context that sees every operation on tensors, in its `__torch_dispatch__`.

    torch documents TorchDispatchMode but keeps it in a private module. No upstream report found
    (2026-11).
    """


def make_fake_mode() -> FakeTensorMode:
    """Make a context whose new tensors have shapes and no memory.

    FakeTensorMode is in a private module; pytorch/pytorch#113456 asks for a public one, #173589 and
    #173671 propose it.
    """
    return FakeTensorMode()


def find_tensors(*values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries.

    torch's tree functions are private. No upstream report found (2026-11).
    """
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def identify_storage(tensor: Tensor) -> int:
    """Return what tells the storage of `tensor`, which views share, from every other that is alive.

    A fake tensor has no address (`data_ptr`) to tell it by. No upstream report found (2026-11).
    """
    return tensor.untyped_storage()._cdata


def changes_its_inputs(operation: Any) -> bool:
    """Return whether an ATen operation writes into an input. Its schema is private to torch."""
    return operation._schema.is_mutable


def replace_tensors(model: nn.Module) -> None:
    """Put new CPU tensors, without values, in the places of the parameters and buffers of `model`.

    Under a fake mode they take no memory. Tied parameters stay tied. Setting `.data` cannot move a
    meta tensor to another device, and `Module.to_empty` unties. No upstream report found (2026-11).
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                empty = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(empty, old.requires_grad)
            module._parameters[name] = made[id(old)]
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)


# transformers


def list_layer_classes(model: PreTrainedModel) -> Collection[str]:
    """Return the class names of the model's layers, the units of sharding and compiling.

    transformers has the names for device maps, which must not split such a module. Models that have
    none, such as DeBERTa, are split by the longest list of modules.
    huggingface/transformers#24568 asked to shard by them; no report for a public name found
    (2026-11).
    """
    if model._no_split_modules:
        return model._no_split_modules
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=[])
    return {type(layer).__name__ for layer in longest}


def read_attention(config: PretrainedConfig) -> str:
    """Return which attention kernels a loaded model uses, such as `sdpa`.

    `set_attn_implementation` is public, but there is no function that reads it. No upstream report
    found (2026-11).
    """
    return config._attn_implementation


@contextmanager
def without_packing_check(active: bool) -> Iterator[None]:
    """Within the context, let transformers take every sequence for a single one, if `active`.

    It would look for packed ones in the position ids, on the device, and the host would wait for a
    GPU in every forward pass (masking_utils.find_packed_sequence_indices, transformers 5.23). There
    is no public way to say that there are none. No upstream report found (2026-11).

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


# transformers: what loading a model's files would do


class ReadingStep(NamedTuple):
    """How transformers makes one parameter or buffer, or several, of tensors in the files."""

    target: str  # the first that it makes
    is_parameter: bool
    sources: dict[str, list[str]]  # pattern of a transform -> names in the files, in order
    transform: WeightConverter | None  # None: the tensor is taken as it is

    def list_keys(self) -> list[str]:
        """Return the names in the files."""
        return [key for keys in self.sources.values() for key in keys]


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

    It has no public function that names them. No upstream report found (2026-11).

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

    A config with a `problem_type` is one of launch.models.head.
    """
    return AutoModelForSequenceClassification if config.problem_type else AutoModelForCausalLM


def make_meta_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make the model of `config` without storage, outside of any ZeRO context.

    It is a causal language model or, by `choose_auto_class`, one with a new head. It has the dtype
    of the config, unless `dtype` is given.

    While an HfDeepSpeedConfig is alive, `from_config` shards what it makes. No upstream report
    found (2026-11).
    """
    with without_zero3(), torch.device("meta"):
        auto_class = choose_auto_class(config)
        return auto_class.from_config(config, **({"dtype": dtype} if dtype else {}))


@contextmanager
def without_zero3() -> Iterator[None]:
    """Hide a live HfDeepSpeedConfig from transformers."""
    found = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = found


def get_ties(model: PreTrainedModel) -> dict[str, str]:
    """Return parameter -> the parameter it is tied to by the config.

    `all_tied_weights_keys` is undocumented. No upstream report found (2026-11).
    """
    return dict(model.all_tied_weights_keys)


def report_loading(
    model: PreTrainedModel, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> LoadingReport:
    """Load names, dtypes and shapes into a model without storage, and report what does not fit.

    These are the steps of `from_pretrained` (transformers 5.23, modeling_utils.py), which would read
    the values, draw what is missing at random, and log its report. It reports less than is wanted
    here: some models' missing parameters are on a list of ignored ones. No upstream report found
    (2026-11).

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
    are to read one after the other. No upstream report found (2026-11).

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

    Its `convert` needs a transform that has collected them. No upstream report found (2026-11).

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

    They are those of experts: each is a file's tensor, and the model has one for all.
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

    `from_pretrained` does, `from_config` does not. No upstream report found (2026-11).

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
    """Give those parameters and buffers of `model` fp32 that transformers keeps in it.

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

    `_init_weights` is private; public functions initialise whole models. No upstream report found
    (2026-11).

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


# DeepSpeed: the process


def forbid_compiled_collective() -> None:
    """Keep DeepSpeed on CPUs from compiling its shared-memory collective; gloo takes its place.

    Compiling needs a compiler and a minute, and if it is killed, the lock that it leaves hangs the
    next start. Call this before `deepspeed.init_distributed`. No upstream report found (2026-11).
    """
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    compatible_ops["deepspeed_shm_comm"] = False


def switch_off_nvtx() -> None:
    """Switch off DeepSpeed's marks for NVIDIA's profiler, a tenth of a small step's time.

    deepspeedai/DeepSpeed#7912 asks for a domain of their own; no report for a public switch found
    (2026-11).
    """
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False


@contextmanager
def deepspeed_device(device: torch.device) -> Iterator[None]:
    """Within the context, let DeepSpeed put weights and engines on `device`, a GPU or the CPU.

    DeepSpeed takes LOCAL_RANK for the GPU's number, also where a launcher shows each rank one GPU,
    number 0, only: deepspeedai/DeepSpeed#3165.
    """
    before = os.environ.get("LOCAL_RANK")
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def get_deepspeed_group() -> dist.ProcessGroup:
    """Return the process group that DeepSpeed makes for its own collectives.

    It has torch's default timeout; deepspeedai/DeepSpeed#2927 asks for a way to give another.
    """
    from deepspeed.utils import groups

    return groups._get_data_parallel_group()


def get_node_group() -> dist.ProcessGroup | None:
    """Return the process group of this node's ranks that DeepSpeed has made for hpZ, if any.

    See `get_deepspeed_group`.
    """
    from deepspeed.utils import groups

    return groups._get_zero_param_intra_parallel_group()


def forget_node_group() -> None:
    """Let DeepSpeed make hpZ's group anew, or none, for the next model that is loaded.

    It keeps the first one for ever: a second `zero.Init` with hpZ fails, as the group is there
    (deepspeedai/DeepSpeed#4901; #8361 is to mend it), and an engine without hpZ would use it.
    """
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def remove_deepspeed_hooks(model: nn.Module) -> None:
    """Remove what a destroyed DeepSpeed engine leaves on the modules of `model`.

    The next engine's backward passes would run the hooks of this one. deepspeedai/DeepSpeed#7204
    asks how an engine is to be deleted and made again.
    """
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
            module.__dict__.pop(name, None)


# DeepSpeed: parameters and optimisers of ZeRO


def is_zero_parameter(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO stage 3 manages `parameter`, so that a rank holds only its shard.

    DeepSpeed documents `ds_id` and the attributes below for debugging only.
    deepspeedai/DeepSpeed#4064, closed as intended, is about sizes of 0; no report for public names
    found (2026-11).
    """
    return hasattr(parameter, "ds_id")


def get_full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a whole parameter's shape, also where ZeRO stage 3 has made its `shape` `[0]`."""
    return getattr(parameter, "ds_shape", parameter.shape)


def count_elements(parameter: nn.Parameter) -> int:
    """Return a whole parameter's number of elements, also where ZeRO stage 3 has sharded it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def get_shard_size(parameter: nn.Parameter) -> int:
    """Return how many elements of a parameter a rank holds under ZeRO stage 3, with padding."""
    return parameter.ds_tensor.ds_numel


def make_adam_state(zero: "ZeROOptimizer", step: int, moments: Collection[str]) -> bool:
    """Make the state of the AdamW inside DeepSpeed's optimiser, with moments of 0.

    AdamW makes its state in its first step, and DeepSpeed's functions that set it only fill it.
    Since deepspeedai/DeepSpeed#5104 DeepSpeed no longer steps to make it; no report for a public
    function found (2026-11).

    Args:
        zero: DeepSpeed's optimiser, around AdamW.
        step: number of steps that the state stands for.
        moments: keys of AdamW's moments.

    Returns:
        Whether the optimiser is that of stage 3, which shards the parameters too.
    """
    sharded = hasattr(zero, "fp32_partitioned_groups_flat")
    shards = zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
    for shard in shards:
        state = {moment: torch.zeros_like(shard, requires_grad=False) for moment in moments}
        # A fused AdamW counts its steps on the device.
        state["step"] = torch.tensor(float(step), device=shard.device)
        zero.optimizer.state[shard] = state
    if not sharded:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    return sharded
