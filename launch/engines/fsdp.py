"""PyTorch FSDP2 (`fully_shard`): each decoder layer is a unit, and each rank reads only its rows."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from astra.weights import TorchWeights
from launch.engines.single import TorchTrainState
from launch.models.check import CheckedModel, read_config
from launch.runtime.compat.torch_parts import set_group_timeout
from launch.runtime.compat.transformers_parts import (
    choose_auto_class,
    convert_tensors,
    keep_in_fp32,
    list_layer_classes,
    make_meta_model,
    plan_reading,
)
from launch.runtime.distributed import FOREVER
from launch.runtime.errors import UserError


class FsdpEngine(TorchWeights):
    """See engines.base.Engine."""

    sharded, reentrant = True, False

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        nodes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Take over all ranks. Collective.

        Args:
            nodes: the ranks of each node, equally many, if each node is to hold a whole model
                (HSDP). None: all ranks hold one model.
        """
        self.device, self.dtype = device, dtype
        if nodes is None:
            # One dimension: ranks that share a model.
            self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            self.shard_mesh = self.mesh
        else:
            # FSDP2 sums gradients over a node's ranks, each of which keeps its shard, and then over
            # the nodes. Ranks may be placed on nodes in any order.
            self.mesh = DeviceMesh(device.type, list(nodes), mesh_dim_names=("replicate", "shard"))
            self.shard_mesh = self.mesh["shard"]
            for name in self.mesh.mesh_dim_names:
                set_group_timeout(self.mesh.get_group(name), FOREVER)

    def load_model(self, checked: CheckedModel, full: bool = False) -> PreTrainedModel:
        self.checked = checked
        if full:
            dtype = torch.float32
            self.policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32)
        else:
            dtype = self.dtype
            self.policy = MixedPrecisionPolicy()  # base and adapters keep their own dtypes
        config = read_config(checked.folder, head=checked.head)
        with init_empty_weights(include_buffers=False):  # buffers are computed, not stored
            self.base = choose_auto_class(config).from_config(config, dtype=dtype)
        if self.base.can_generate():
            # It may name end tokens that config.json lacks. `from_pretrained` reads it, and does
            # without it where it is missing or broken; `from_config` does not.
            with suppress(OSError):
                self.base.generation_config = GenerationConfig.from_pretrained(
                    checked.folder, local_files_only=True
                )
        self.base.tie_weights()  # without storage each module was given a weight of its own
        keep_in_fp32(self.base, dtype)
        # Parameters are found by module later: adapters will wrap modules and so change their
        # names, and FSDP2 will put other parameters in the places of these. Buffers that are in
        # the files are found in the same way.
        self.owners: dict[str, tuple[nn.Module, str]] = {}
        stored = self.base.state_dict().keys()
        for prefix, module in self.base.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, _ in own:
                full_name = f"{prefix}.{name}".lstrip(".")
                if full_name in stored:
                    self.owners[full_name] = (module, name)
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
        num_replicas = self.mesh.size() // self.shard_mesh.size()
        return TorchTrainState(model, optimizer, max_grad_norm, num_replicas)

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
        # Ranks may differ in what their rows reach (an expert that one rank's tokens do not choose);
        # without it their gradients of other parameters would be added up.
        self.base.set_reduce_scatter_unused_params(True)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device=self.device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        self.base.tie_weights()  # to_empty gave each module a storage of its own

    @torch.no_grad()
    def _read_weights(self) -> None:
        """Read this rank's shards, and whole buffers, from the checked files.

        A parameter that transformers makes of several tensors, such as those of experts, is made
        whole on the CPU, one at a time, and its shard is kept.

        Raises:
            UserError: a parameter has no values. `check_model` has found all, so transformers has
                then read a parameter in another way than `plan_reading` says.
        """
        model = make_meta_model(self.base.config)  # with the names that the files go by
        filled = set()
        with ExitStack() as stack:
            files: dict[str, Any] = {}  # name of a tensor -> its opened file
            for path in self.checked.files:
                file = stack.enter_context(safe_open(path, framework="pt"))
                files |= dict.fromkeys(file.keys(), file)
            for step in plan_reading(model, files):
                if step.transform is None:
                    (key,) = step.list_keys()
                    made = {step.target: files[key].get_slice(key)}
                else:
                    made = convert_tensors(step, model, lambda key: files[key].get_tensor(key))
                for name, values in made.items():
                    filled.add(id(self._fill(name, values)))
        for name, (module, attribute) in self.owners.items():
            # A tied weight is in the files under one of its names only.
            if (
                id(getattr(module, attribute)) not in filled
                and name not in self.checked.new_weights
            ):
                raise UserError(
                    f"engine: fsdp cannot read {name} of {self.checked.folder}; use engine=zero3 "
                    "for this model"
                )

    def _fill(self, name: str, values: Any) -> Tensor:
        """Copy this rank's part of `values`, a tensor or a slice of a file, and return its place."""
        module, attribute = self.owners[name]
        tensor = getattr(module, attribute)
        if not isinstance(tensor, DTensor):
            tensor.copy_(values[...])
            return tensor
        shard = tensor.to_local()
        # fully_shard splits dimension 0 as torch.chunk does: ceil(size / world) rows a rank.
        mesh = self.shard_mesh
        start = mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size())
        if len(shard):
            shard.copy_(values[start : start + len(shard)])
        return tensor
