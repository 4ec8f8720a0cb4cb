"""PyTorch FSDP2 (`fully_shard`): each decoder layer is a unit, and each rank reads only its rows."""

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
from launch.engines.single import TorchTrainState
from launch.runtime.compat import list_layer_classes
from launch.runtime.errors import UserError


class FsdpEngine(TorchWeights):
    """See engines.base.Engine."""

    sharded, reentrant = True, False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def load_model(self, path: str, full: bool = False) -> PreTrainedModel:
        self.path = Path(path)
        if full:
            dtype = torch.float32
            self.policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32)
        else:
            dtype = self.dtype
            self.policy = MixedPrecisionPolicy()  # base and adapters keep their own dtypes
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with init_empty_weights(include_buffers=False):  # buffers are computed, not stored
            self.base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.base.tie_weights()  # without storage each module was given a weight of its own
        # Parameters are found by module later: adapters will wrap modules and so change their
        # names, and FSDP2 will put other parameters in the places of these.
        self.owners: dict[str, tuple[nn.Module, str]] = {}
        for prefix, module in self.base.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                self.owners[f"{prefix}.{name}".lstrip(".")] = (module, name)
        return self.base.requires_grad_(full)

    def materialize(self, model: nn.Module) -> None:
        if not isinstance(next(self.base.parameters()), DTensor):
            self._shard(model)
            self._read_weights()

    @contextmanager
    def inference_mode(self, model: nn.Module) -> Iterator[None]:
        model.eval()
        yield

    def make_trainable(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> TorchTrainState:
        # FSDP2 averages gradients over ranks in each backward pass, so micro batches add up.
        return TorchTrainState(model, optimizer, max_grad_norm)

    def _shard(self, model: nn.Module) -> None:
        """Shard `model`, whose parameters have no storage yet, with the adapters in it.

        The units are under the base and not under PEFT's wrapper, since `generate` calls the base
        itself.
        """
        layer_classes = list_layer_classes(self.base)
        for module in self.base.modules():
            if type(module).__name__ in layer_classes:
                fully_shard(module, mesh=self.mesh, mp_policy=self.policy)
        # By default FSDP2 keeps the root's own weights whole after a forward pass, and what is
        # written to their shards then is lost.
        fully_shard(self.base, mesh=self.mesh, mp_policy=self.policy, reshard_after_forward=True)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device=self.device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        self.base.tie_weights()  # to_empty gave each module a storage of its own

    @torch.no_grad()
    def _read_weights(self) -> None:
        """Read this rank's shards from the files.

        Raises:
            UserError: the files lack a weight.
        """
        files: dict[str, Path] = {}  # name of a weight -> its file
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
                shard = parameter.to_local()
                # fully_shard splits dimension 0 as torch.chunk does: ceil(size / world) rows a rank.
                start = dist.get_rank() * -(-parameter.shape[0] // self.mesh.size())
                if len(shard):
                    shard.copy_(values[start : start + len(shard)])
            filled.add(id(parameter))
        for name, (module, attribute) in self.owners.items():
            # A tied weight is in the files under one of its names only.
            if id(getattr(module, attribute)) not in filled:
                raise UserError(
                    f"engine: fsdp finds no weight {name} in {self.path}; use engine=zero3 for "
                    "this model"
                )
