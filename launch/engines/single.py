"""Plain PyTorch: every rank holds the whole model. Trains in one process; more ranks may evaluate."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from astra.weights import TorchWeights
from launch.engines.base import MOMENTS
from launch.models.check import CheckedModel

WEIGHTS = TorchWeights()


class TorchTrainState:
    """A plain optimiser with gradient clipping, over whole or FSDP2-sharded parameters."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                # That no backward pass reached: an expert that no token chose, a vision tower. As
                # under ZeRO it takes the step with a gradient of 0, so that AdamW has moments of
                # it, and one count of steps is right for all parameters.
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate_factor"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def read_state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        state = self.optimizer.state[parameter]
        exp_avg, exp_avg_sq = (WEIGHTS.read(state[moment]) for moment in MOMENTS)
        return WEIGHTS.read(parameter), exp_avg, exp_avg_sq

    def restore_state(
        self, step: int, states: Iterable[tuple[nn.Parameter, Tensor, Tensor, Tensor]]
    ) -> None:
        for parameter, trained, *moments in states:
            WEIGHTS.write(parameter, trained)
            # A fused AdamW counts its steps on the device.
            state = {"step": torch.tensor(float(step), device=parameter.device)}
            for moment, value in zip(MOMENTS, moments, strict=True):
                state[moment] = torch.zeros_like(parameter, requires_grad=False)
                WEIGHTS.write(state[moment], value)
            self.optimizer.state[parameter] = state


class SingleEngine(TorchWeights):
    """See engines.base.Engine."""

    sharded = reentrant = False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def load_model(self, checked: CheckedModel, full: bool = False) -> PreTrainedModel:
        dtype = torch.float32 if full else self.dtype
        model = AutoModelForCausalLM.from_pretrained(
            str(checked.folder), dtype=dtype, local_files_only=True, use_safetensors=True
        )
        model = model.to(self.device)
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
