"""PyTorch FSDP2 (`fully_shard`): every decoder layer is a unit, and each rank reads only its own rows of the files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from astra.weights import TorchWeights
from launch.engines.single import TorchStepper
from launch.runtime.errors import UserError


class FsdpEngine(TorchWeights):
    """See engines.base.Engine."""

    sharded, reentrant = True, False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def load(self, path: str, full: bool = False) -> PreTrainedModel:
        dtype = torch.float32 if full else self.dtype
        # Of adapters in a bfloat16 base each parameter keeps its own dtype.
        self.policy = (
            MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32)
            if full
            else MixedPrecisionPolicy()
        )
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with init_empty_weights(include_buffers=False):  # buffers are computed, not stored
            self.base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.base.tie_weights()  # without storage each module was given a weight of its own
        self.path = Path(path)
        # By module, since adapters will wrap the modules and so change their names.
        self.owners = {
            f"{prefix}.{name}".lstrip("."): (module, name)
            for prefix, module in self.base.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }
        return self.base.requires_grad_(full)

    @contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        if not isinstance(next(self.base.parameters()), DTensor):
            self._shard(model)
        model.eval()
        yield

    def training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> TorchStepper:
        # FSDP averages gradients over ranks in each backward pass, so micro batches simply add up.
        return TorchStepper(model, optimizer, max_grad_norm)

    def _shard(self, model: nn.Module) -> None:
        """Shard `model`, whose parameters have no storage yet, with the adapters in it, and fill the base's shards.

        The units are under the base and not under PEFT's wrapper, since `generate` calls the base itself.
        """
        for module in self.base.modules():
            if type(module).__name__ in self.base._no_split_modules:
                fully_shard(module, mesh=self.mesh, mp_policy=self.policy)
        # FSDP would keep the root's own weights whole after a forward pass, where writes to them were lost.
        fully_shard(self.base, mesh=self.mesh, mp_policy=self.policy, reshard_after_forward=True)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device=self.device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        self.base.tie_weights()  # each module was given a storage of its own
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        files = {}
        for path in sorted(self.path.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        filled = set()
        for name, (module, attribute) in self.owners.items():
            parameter = getattr(module, attribute)
            if name not in files:
                continue
            with safe_open(files[name], framework="pt") as file:
                values = file.get_slice(name)
                local = parameter.to_local()
                # fully_shard splits dimension 0 as torch.chunk does: ceil(size / world) rows a rank.
                start = dist.get_rank() * -(-parameter.shape[0] // self.mesh.size())
                if len(local):
                    local.copy_(values[start : start + len(local)])
            filled.add(id(parameter))
        for name, (module, attribute) in self.owners.items():
            if (
                id(getattr(module, attribute)) not in filled
            ):  # a tied weight is filled under its other name
                raise UserError(
                    f"engine: fsdp finds no weight {name} in {self.path}; use engine=zero3 for this model"
                )
