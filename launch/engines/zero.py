"""DeepSpeed ZeRO: stage 3 shards the base as it is loaded; stage 2 shards gradients and optimiser.

An engine's DeepSpeed configuration is ds_configs/<engine>.json.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from astra.weights import TorchWeights
from launch.engines.base import MOMENTS, load_pretrained, read_deepspeed_config
from launch.models.check import CheckedModel
from launch.runtime.compat.deepspeed_parts import (
    deepspeed_device,
    forbid_compiled_collective,
    forget_node_group,
    get_deepspeed_group,
    get_node_group,
    get_shard_size,
    is_zero_parameter,
    make_adam_state,
    remove_deepspeed_hooks,
    switch_off_nvtx,
)
from launch.runtime.compat.torch_parts import set_group_timeout
from launch.runtime.compat.transformers_parts import list_layer_classes
from launch.runtime.distributed import FOREVER


class ZeroWeights:
    """`Weights` of a model that stage 3 has sharded, or that every rank holds whole."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        if not is_zero_parameter(parameter):
            value = value.to(parameter).contiguous()
            dist.broadcast(value, 0)
            TorchWeights().write(parameter, value)
            return
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(value)


WEIGHTS = ZeroWeights()


class ZeroTrainState:
    """See engines.base.TrainState: a DeepSpeed engine with its optimiser."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> None:
        # The engine's forward counts micro batches: without it stage 3 would keep only the last
        # one's gradient.
        self.model = self.engine = engine
        self.optimizer = optimizer
        if len(optimizer.param_groups) > 1:
            # After the first group's first step stage 2 links the moments of all groups, once. Groups
            # that have not stepped have no moments then and would never be linked, so make all
            # moments now: those that are not linked cannot be read.
            make_adam_state(optimizer, 0, MOMENTS)

    def backward(self, loss: Tensor, last: bool) -> None:
        # Told for each micro batch, because packed steps differ in how many they have.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # advances DeepSpeed's count of micro batches; updates nothing

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def read_state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        exp_avg, exp_avg_sq = (
            safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS
        )
        return safe_get_full_fp32_param(parameter), exp_avg, exp_avg_sq

    def restore_state(
        self, step: int, states: Iterable[tuple[nn.Parameter, Tensor, Tensor, Tensor]]
    ) -> None:
        sharded = make_adam_state(self.optimizer, step, MOMENTS)
        for parameter, trained, *moments in states:
            WEIGHTS.write(parameter, trained)
            if sharded:
                # DeepSpeed's functions that set whole values fail where shards are padded.
                safe_set_local_fp32_param(parameter, _cut_shard(parameter, trained))
                for moment, value in zip(MOMENTS, moments, strict=True):
                    safe_set_local_optimizer_state(parameter, _cut_shard(parameter, value), moment)
            else:
                safe_set_full_fp32_param(parameter, trained)
                for moment, value in zip(MOMENTS, moments, strict=True):
                    safe_set_full_optimizer_state(parameter, value, moment)


def _cut_shard(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Cut this rank's shard from a parameter's whole `value`.

    Stage 3 flattens a parameter, pads it at the end and splits it into shards of equal size.
    """
    size = get_shard_size(parameter)
    padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded[size * dist.get_rank() :][:size]


class ZeroEngine(ZeroWeights):
    """See engines.base.Engine."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        node_size: int | None = None,
    ) -> None:
        """Take over all ranks. Collective.

        Args:
            name: that of a file in ds_configs/.
            node_size: ranks of each node, if each node is to hold a copy of the frozen base, besides
                the shards of all ranks (ZeRO++'s hpZ). Rank i is on node i // node_size.
        """
        self.device, self.dtype = device, dtype
        self.config = read_deepspeed_config(name)
        self.node_size = node_size
        if node_size is not None:
            self.config["zero_optimization"]["zero_hpz_partition_size"] = node_size
        # DeepSpeed requires it, but only its own log uses it.
        self.config["train_micro_batch_size_per_gpu"] = 1
        self.sharded = self.config["zero_optimization"]["stage"] == 3
        # Stage 3 takes the base's dtype from here. Elsewhere it would cast the adapters, which are
        # to stay in fp32.
        self._use_bf16(self.sharded and dtype == torch.bfloat16)
        # The other form of checkpointing compares the shapes of saved weights, which stage 3 has
        # released by then.
        self.reentrant = self.sharded
        forbid_compiled_collective()
        switch_off_nvtx()
        # Wraps the process group; before this zero.Init would see one rank.
        with deepspeed_device(device):
            deepspeed.init_distributed(verbose=False)
        set_group_timeout(get_deepspeed_group(), FOREVER)
        forget_node_group()

    def _use_bf16(self, enabled: bool) -> None:
        """Set the dtype of the weights, and fp32 for sums of gradients."""
        self.config["bf16"] = {"enabled": enabled}
        # By default gradients would be added up in bf16 too: over micro batches, and over ranks
        # even those of fp32 adapters.
        self.config["data_types"] = {"grad_accum_dtype": "fp32"}
        self.config["communication_data_type"] = "fp32"

    def load_model(self, checked: CheckedModel, full: bool = False) -> PreTrainedModel:
        if full:
            # DeepSpeed's optimiser then holds fp32 weights.
            self._use_bf16(self.dtype == torch.bfloat16)
        if self.sharded:
            # transformers looks for a live object of this class, now and while the model is used.
            self.transformers_config = HfDeepSpeedConfig(self.config)
        with deepspeed_device(self.device):
            model = load_pretrained(checked, self.dtype)
        self.base = model
        if self.node_size is not None:
            set_group_timeout(get_node_group(), FOREVER)
        if self.sharded:
            self._gather_by_layer(model)
        return (model if self.sharded else model.to(self.device)).requires_grad_(full)

    def _gather_by_layer(self, model: PreTrainedModel) -> None:
        """Let stage 3 gather a decoder layer at a time, its adapters included.

        By default it gathers every linear layer by itself, with hooks in Python around each of its
        passes: of 32 layers with adapters they take more than half of the host's time, which a fast
        GPU waits for. They also change the order in which gradients of hidden states are added up; by
        layers the losses are those of one process to the bit (tests/distributed/test_leaves.py).

        Not the embeddings, which transformers does not split in encoders either: they have no input
        with a gradient, so DeepSpeed would take their backward pass to be over before it began.
        """
        layer_classes = list_layer_classes(model)
        for module in model.get_decoder().modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    if type(layer).__name__ in layer_classes:
                        set_z3_leaf_module(layer, True)

    def materialize(self, model: nn.Module) -> None:
        """Have stage 3 take over adapters that were attached since; the base is read already."""
        parameters = model.parameters()
        if self.sharded and not all(is_zero_parameter(p) for p in parameters):
            with self.inference_mode(model):  # DeepSpeed shards what is not, on the device
                pass

    @contextmanager
    def inference_mode(self, model: nn.Module) -> Iterator[None]:
        if not self.sharded:
            model.eval()
            yield
            return
        # A zero.Init model gathers its weights in `forward` only inside a DeepSpeed engine.
        with deepspeed_device(self.device):
            engine, *_ = deepspeed.initialize(model=model, config=self.config)
        engine.eval()
        try:
            yield
        finally:
            engine.destroy()
            remove_deepspeed_hooks(model)

    def make_trainable(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> ZeroTrainState:
        config = self.config | {"gradient_clipping": max_grad_norm}
        if self.sharded:
            # transformers' gradient checkpointing has asked for what is asked for below: too early.
            self.base.disable_input_require_grads()
        with deepspeed_device(self.device):
            engine, optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config
            )
        if self.sharded:
            # DeepSpeed takes a layer's backward pass to be over when the gradient of its input is
            # there. The first layer's input would have none, and the pass be over before it began.
            # Reentrant checkpointing wants that gradient too. Asked for after DeepSpeed's hooks are
            # in place, or they would gather the embedding in every backward pass.
            self.base.enable_input_require_grads()
        return ZeroTrainState(engine, optimizer)
