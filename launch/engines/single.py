"""Plain PyTorch: every rank holds the whole model. Trains in one process; more ranks may evaluate."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from astra.weights import TorchWeights
from launch.engines.base import MOMENTS, load_pretrained
from launch.models.check import CheckedModel
from launch.runtime.compat.torch_parts import compute_norms

WEIGHTS = TorchWeights()


class TorchTrainState:
    """A plain optimiser with gradient clipping, over whole parameters or FSDP2's shards of them.

    The optimiser steps plain tensors, of FSDP2's DTensors the local ones. AdamW and clipping work
    on each number by itself, so the values are the same, but every operation on a DTensor costs the
    host several times what it costs on a tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        num_replicas: int | None = None,
    ) -> None:
        """Take over a new optimiser of `model`.

        Args:
            num_replicas: how many ranks hold each shard; None where parameters are whole.
        """
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.num_replicas = num_replicas
        self.shards: dict[nn.Parameter, Tensor] = {}  # parameter -> what the optimiser steps
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.shards[parameter] = _get_shard(parameter)
            group["params"] = [self.shards[parameter] for parameter in group["params"]]

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        for parameter, shard in self.shards.items():
            if parameter.grad is None:
                # That no backward pass reached: an expert that no token chose, a vision tower. As
                # under ZeRO it takes the step with a gradient of 0, so that AdamW has moments of
                # it, and one count of steps is right for all parameters.
                shard.grad = torch.zeros_like(shard)
            else:
                shard.grad = _get_shard(parameter.grad)
        norm = self._compute_grad_norm()
        nn.utils.clip_grads_with_norm_(self.shards.values(), self.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.step()
        for parameter, shard in self.shards.items():
            parameter.grad = shard.grad = None
        return norm

    def _compute_grad_norm(self) -> Tensor:
        """Compute the norm of the gradient of all parameters, a scalar. Collective for shards."""
        gradients = [shard.grad for shard in self.shards.values()]
        if self.num_replicas is None or dist.get_world_size() == 1:
            return nn.utils.get_total_norm(gradients)
        # A parameter's norm^2 is the sum over ranks of their shards' norm^2 / num_replicas. The sum
        # is over all ranks, also where nodes hold replicas: all clip by one number, to the bit.
        squares = torch.stack(compute_norms(gradients)) ** 2
        dist.all_reduce(squares)
        return torch.linalg.vector_norm((squares / self.num_replicas) ** 0.5)

    def read_state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        state = self.optimizer.state[self.shards[parameter]]
        exp_avg, exp_avg_sq = (
            WEIGHTS.read(_make_whole(state[moment], parameter)) for moment in MOMENTS
        )
        return WEIGHTS.read(parameter), exp_avg, exp_avg_sq

    def restore_state(
        self, step: int, states: Iterable[tuple[nn.Parameter, Tensor, Tensor, Tensor]]
    ) -> None:
        for parameter, trained, *moments in states:
            WEIGHTS.write(parameter, trained)
            shard = self.shards[parameter]
            # A fused AdamW counts its steps on the device.
            state = {"step": torch.tensor(float(step), device=shard.device)}
            for moment, value in zip(MOMENTS, moments, strict=True):
                state[moment] = torch.zeros_like(shard, requires_grad=False)
                WEIGHTS.write(_make_whole(state[moment], parameter), value)
            self.optimizer.state[shard] = state


@torch.no_grad()
def _get_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _make_whole(shard: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return the tensor of which `shard` is this rank's part, distributed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class SingleEngine(TorchWeights):
    """See engines.base.Engine."""

    sharded = reentrant = False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def load_model(self, checked: CheckedModel, full: bool = False) -> PreTrainedModel:
        dtype = torch.float32 if full else self.dtype
        model = load_pretrained(checked, dtype).to(self.device)
        if dtype != self.dtype:
            model.forward = torch.autocast(self.device.type, self.dtype)(model.forward)
        return model.requires_grad_(full)

    def materialize(self, model: nn.Module) -> None:
        """Do nothing: `load_model` reads whole weights."""

    @contextmanager
    def inference_mode(self, model: nn.Module) -> Iterator[None]:
        model.eval()
        yield

    def make_trainable(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> TorchTrainState:
        assert dist.get_world_size() == 1, "gradients are not averaged over ranks"
        return TorchTrainState(model, optimizer, max_grad_norm)
