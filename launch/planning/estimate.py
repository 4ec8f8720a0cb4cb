"""What a run would take, from the model's config alone: no weights, no GPU, nothing allocated.

One calibration batch and one micro batch really run, on PyTorch's fake tensors, which have shapes and no memory: the
bytes alive at the peak and the matrix products are counted while the run's own code makes them.
"""

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig

from astra import adapter
from astra.flops import solve_flops, sum_flops
from astra.gradients import gradients
from astra.moments import find_groups, forward
from astra.windows import FP64, Plan, find_layers, make_plan
from launch.config.schema import Recipe
from launch.engines.base import read_config
from launch.methods import registry as methods
from launch.methods import trainable
from launch.training.loss import AnswerLoss, label_loss

FP32 = 4  # bytes
ATEN = torch.ops.aten
FLOPS = flop_registry | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        ATEN._scaled_dot_product_flash_attention
    ],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Stage:
    """One stage's cost on each rank."""

    memory: dict[str, int]  # bytes by what they hold; all are held at once at the stage's peak
    flops: float  # in the model's dtype, over all ranks

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """What a run would take."""

    parameters: int  # of the base
    trainable: int
    calibration: Stage
    initialisation: Stage
    training: Stage
    windows: Plan | None  # None: the method needs no calibration
    hidden_states: int  # bytes on the CPU, on each rank: carried from window to window
    sum_flops: float  # fp64, of the calibration's sums, over all ranks
    solve_flops: float  # fp64, of its eigenproblems, over all ranks
    files: dict[str, int]  # bytes by what they hold


def estimate(
    config: PretrainedConfig,
    recipe: Recipe,
    *,
    ranks: int,
    dtype: torch.dtype,
    checkpointing: bool,
    steps: int,
) -> Estimate:
    """The cost of `recipe` with a model of `config` on `ranks` ranks, every row being data.max_length tokens long.

    Args:
        dtype: of the base. checkpointing: gradients with activations computed anew. steps: of the optimiser.

    Raises:
        AstraError: targets, ranks or calibration.memory_gib do not fit the model.
    """
    wanted, settings = recipe.adapter, recipe.train
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(
            wanted.method == "full"
        )
    parameters = sum(p.numel() for p in base.parameters())
    model = trainable.attach(base, wanted)
    linears = adapter.base_layers(trainable.layers(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = _held(recipe.engine, base, trained, ranks, full=wanted.method == "full")

    length, rows = recipe.data.max_length, recipe.calibration.batch_size
    windows, samples, statistics_flops, solving_flops, carried = None, 0, 0.0, 0.0, 0
    with FakeTensorMode():
        _fake(model)
        ids = torch.zeros(rows, length, dtype=torch.long)
        if wanted.method in methods.CALIBRATED:
            kind = methods.kind(recipe)
            with trainable.untrained(model):
                groups = find_groups(model, linears, {"input_ids": ids}, kind.needs)
            memory = recipe.calibration.memory_gib
            windows = make_plan(
                base,
                linears,
                groups,
                tokens=length * rows,
                parts=1 + recipe.calibration.split_half,
                memory=None if memory is None else memory * 2**30,
                decomposed=kind.decomposes,
            )
            samples = 0 if kind.needs == "weight" else recipe.calibration.samples
            of_rank = math.ceil(samples / (rows * ranks)) * rows
            hidden = config.get_text_config().hidden_size
            carried = (
                of_rank * length * hidden * dtype.itemsize
                if windows.layers and kind.needs != "gradient"
                else 0
            )
            statistics_flops = samples * length * sum(sum_flops(group, linears) for group in groups)
            kept = dict.fromkeys(linears, wanted.rank)
            solving_flops = sum(
                solve_flops(group, linears, kept, kind.decomposes) for group in groups
            )
        with _Counting() as calibrating, trainable.untrained(model):
            if windows and kind.needs == "gradient":
                window = windows.windows[0]
                gradients(
                    model.eval(), linears, [{"input_ids": ids, "labels": ids}], window, label_loss
                )
                calibrating.peak -= (
                    window.statistics
                )  # whose in-place sums are not among the products counted
                calibrating.flops *= len(windows.windows)
            else:
                with torch.no_grad():
                    forward(model.eval(), {"input_ids": ids})
        calibration_flops = calibrating.flops / rows * samples
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        micro_batch = min(settings.micro_batch, math.ceil(settings.global_batch / ranks))
        ids = torch.zeros(micro_batch, length, dtype=torch.long)
        _without_gradients(model)
        counted = torch.arange(
            ids.numel() - 1
        )  # every token, as rows are taken to be as long as may be
        with _Counting() as training:
            AnswerLoss(model.train())(ids, counted, ids.flatten()[1:]).backward()
    step_flops = training.flops / micro_batch * settings.global_batch

    largest = max(
        (linear.in_features * linear.out_features for linear in linears.values()), default=0
    )
    # W in its own dtype, gathered and copied; W, B0 A0, W_res and what is between them in fp64.
    one_weight = largest * (3 * dtype.itemsize + 6 * FP64)
    of_windows = {
        "statistics": max(window.statistics for window in windows.windows) if windows else 0,
        "forward pass or solving": max(calibrating.peak if samples else 0, windows.working)
        if windows
        else 0,
    }
    return Estimate(
        parameters,
        trained,
        calibration=Stage(_but(held, "gradients and optimiser") | of_windows, calibration_flops),
        initialisation=Stage(
            {key: held[key] for key in ("base", "adapters")} | {"one weight": one_weight}, 0.0
        ),
        # Activations are at their most when the backward pass begins, with nothing under way.
        training=Stage(
            _but(held, "prefetched") | {"activations": training.peak}, steps * step_flops
        ),
        windows=windows,
        hidden_states=carried,
        sum_flops=statistics_flops,
        solve_flops=solving_flops,
        files={
            **_files(wanted.method, parameters * dtype.itemsize, FP32 * trained),
            "calibration: eigenvectors, or factors, fp64": FP64
            * wanted.rank
            * sum(
                x.out_features + (wanted.method != "astra") * x.in_features
                for x in linears.values()
            )
            if windows
            else 0,
        },
    )


def _files(method: str, whole: int, trained: int) -> dict[str, int]:
    """Bytes of a checkpoint and of what is exported, by what they hold; `whole` model and fp32 `trained` parameters."""
    moments = "both moments of AdamW, fp32"
    if method == "full":
        return {f"a checkpoint (all parameters and {moments})": 3 * trained, "export: model": whole}
    exported = {"dora": 1, "lora": 2, "rslora": 2, "eva": 2}.get(
        method, 4
    )  # the others start on a residual
    names = {
        4: "adapter, astra_init and lora of twice the rank",
        2: "adapter and lora",
        1: "adapter",
    }[exported]
    return {
        f"a checkpoint (A0, B0, what is trained and {moments})": 4 * trained,
        f"export: {names}": exported * trained,
    }


def _held(engine: str, base: nn.Module, trained: int, ranks: int, full: bool) -> dict[str, int]:
    """Bytes on each rank's device of the model and its optimiser, by engine; `gathered` while they are used."""
    of_zero = {} if engine in ("single", "fsdp") else read_config(engine)["zero_optimization"]
    sharded, offload = engine == "fsdp" or of_zero.get("stage") == 3, "offload_param" in of_zero
    whole, stepped = _weight_bytes(base, full), FP32 * trained
    held = {
        # Of full fine-tuning FSDP2 and plain PyTorch hold what AdamW steps, DeepSpeed a copy in the model's dtype.
        "base": (stepped if full and not of_zero else whole) // (ranks if sharded else 1),
        "adapters": 0 if full else stepped // (ranks if sharded else 1),
        "gradients and optimiser": 3 * stepped // ranks,  # AdamW has two moments
        "gathered": 0,
        "prefetched": 0,
    }
    if of_zero:  # DeepSpeed's own copy of what it steps, and its buffer of gradients to be reduced
        buffer = FP32 * min(trained, of_zero["reduce_bucket_size"])
        held["gradients and optimiser"] = buffer + (0 if offload else 4 * stepped // ranks)
    if offload:
        held |= {"base": 0, "adapters": 0}
    if engine == "fsdp":  # a layer while the next one comes, or what is outside of layers
        layers = sorted(_weight_bytes(layer, full) for layer in find_layers(base, {}))
        held["gathered"] = max(whole - sum(layers) + layers[-1], sum(layers[-2:])) * (
            2 if full else 1
        )  # and gradients
    elif engine == "single" and full and whole < stepped:
        held["gathered"] = whole  # autocast's copies
    elif sharded and (ranks > 1 or offload):
        itemsize = next(base.parameters()).element_size()
        held["gathered"] = min(whole, of_zero["stage3_max_live_parameters"] * itemsize)
        held["prefetched"] = 2 * min(
            whole, of_zero["stage3_prefetch_bucket_size"] * itemsize
        )  # and its copy
    return held


def _but(parts: dict[str, int], left_out: str) -> dict[str, int]:
    return {name: size for name, size in parts.items() if name != left_out}


def _weight_bytes(module: nn.Module, full: bool) -> int:
    """Of the base's weights in `module`: adapters are what is trained where that is not all."""
    return sum(
        p.numel() * p.element_size() for p in module.parameters() if full or not p.requires_grad
    )


class _Counting(TorchDispatchMode):
    """Counts the bytes of tensors made within it, at their most, and the arithmetic of matrix products.

    Not by FlopCounterMode, whose hooks keep inputs of modules alive, and which does not know attention on CPUs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 (PyTorch's signature)
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self.known:
                    self.known.add(storage)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.alive -= size


def _fake(model: nn.Module) -> None:
    """Under a FakeTensorMode, CPU tensors in the places of meta ones, for which attention takes a costlier path."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(
                        torch.empty(old.shape, dtype=old.dtype), old.requires_grad
                    )
                module._parameters[name] = made[id(old)]
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)


def _without_gradients(model: nn.Module) -> None:
    """Let go of every gradient as soon as it is there: they are counted by `_held`, sharded."""

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(let_go)
