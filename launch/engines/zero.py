"""DeepSpeed ZeRO, from ds_configs/: stage 3 shards the base as it is loaded; stage 2 shards gradients and optimiser."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.ops import __compatible_ops__ as compatible_ops
from deepspeed.utils import (
    groups,
    nvtx,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from astra.weights import TorchWeights
from launch.engines.base import read_config
from launch.runtime.distributed import FOREVER

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroWeights:
    """`Weights` of a model that stage 3 has sharded, or that every rank holds whole."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        if not hasattr(parameter, "ds_id"):
            value = value.to(parameter).contiguous()
            dist.broadcast(value, 0)
            TorchWeights().write(parameter, value)
            return
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(value)


WEIGHTS = ZeroWeights()


class ZeroStepper:
    """A DeepSpeed engine with its optimiser."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> None:
        # Its forward counts micro batches: without it stage 3 would keep only the last one's gradient.
        self.model = self.engine = engine
        self.optimizer = optimizer

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(
            last
        )  # packed steps differ in their number of micro batches
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # advances DeepSpeed's count of micro batches; updates nothing

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        moments = (safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS)
        return safe_get_full_fp32_param(parameter), *moments

    def restore(
        self, step: int, states: Iterable[tuple[nn.Parameter, Tensor, Tensor, Tensor]]
    ) -> None:
        zero, adam = self.optimizer, self.optimizer.optimizer
        # AdamW makes its state in its first step; DeepSpeed's own functions below only fill it.
        sharded = hasattr(zero, "fp32_partitioned_groups_flat")  # stage 3
        for shard in (
            zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
        ):
            adam.state[shard] = {
                kind: torch.zeros_like(shard, requires_grad=False) for kind in MOMENTS
            }
            adam.state[shard]["step"] = torch.tensor(float(step))
        if not sharded:
            zero._lazy_init_hp_params_optimizer_state()
        for parameter, trained, *moments in states:
            WEIGHTS.write(parameter, trained)
            if sharded:
                # Not by DeepSpeed's functions for whole values, which fail where shards are padded.
                safe_set_local_fp32_param(parameter, _shard(parameter, trained))
                for kind, value in zip(MOMENTS, moments, strict=True):
                    safe_set_local_optimizer_state(parameter, _shard(parameter, value), kind)
            else:
                safe_set_full_fp32_param(parameter, trained)
                for kind, value in zip(MOMENTS, moments, strict=True):
                    safe_set_full_optimizer_state(parameter, value, kind)


def _shard(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a parameter's whole `value`, as stage 3 lays it out: of equal size, padded at the end."""
    size = parameter.ds_tensor.ds_numel
    padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded[size * dist.get_rank() :][:size]


class ZeroEngine(ZeroWeights):
    """See engines.base.Engine. `name` is that of a file in ds_configs/."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.config = read_config(name)
        self.config["train_micro_batch_size_per_gpu"] = (
            1  # required, but only DeepSpeed's own log uses it
        )
        self.sharded = self.config["zero_optimization"]["stage"] == 3
        # Stage 3 takes the base's dtype from here. Elsewhere it would cast the adapters, which are to stay in fp32.
        self._use_bf16(self.sharded and dtype == torch.bfloat16)
        # The other form compares the shapes of saved weights, which stage 3 has let go of by then.
        self.reentrant = self.sharded
        # On CPUs DeepSpeed would compile a shared-memory collective, which needs a compiler and a minute.
        compatible_ops["deepspeed_shm_comm"] = False
        nvtx.enable_nvtx = False  # a tenth of a small step's time, for a profiler that is not there
        deepspeed.init_distributed(
            verbose=False
        )  # wraps the process group; before it zero.Init sees one rank
        _set_pg_timeout(
            FOREVER, groups._get_data_parallel_group()
        )  # DeepSpeed's own, made with torch's default

    def _use_bf16(self, enabled: bool) -> None:
        self.config["bf16"] = {"enabled": enabled}
        # By default micro batches' gradients would be added up in bf16 too.
        self.config["data_types"] = {"grad_accum_dtype": "fp32"}

    def load(self, path: str, full: bool = False) -> PreTrainedModel:
        if full:
            self._use_bf16(
                self.dtype == torch.bfloat16
            )  # DeepSpeed's optimiser then holds fp32 weights
        if self.sharded:
            # transformers looks for a live object of this class, now and while the model is used.
            self.transformers_config = HfDeepSpeedConfig(self.config)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, local_files_only=True)
        return (model if self.sharded else model.to(self.device)).requires_grad_(full)

    @contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        if not self.sharded:
            model.eval()
            yield
            return
        # A zero.Init model gathers its weights in `forward` only inside a DeepSpeed engine.
        engine, *_ = deepspeed.initialize(model=model, config=self.config)
        engine.eval()
        try:
            yield
        finally:
            engine.destroy()
            # It leaves these on the modules, and the next engine's backward passes would run this one's hooks.
            for module in model.modules():
                for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
                    module.__dict__.pop(name, None)

    def training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> ZeroStepper:
        config = self.config | {"gradient_clipping": max_grad_norm}
        engine, optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )
        return ZeroStepper(engine, optimizer)
