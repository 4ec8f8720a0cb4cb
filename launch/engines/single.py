"""Plain PyTorch: every rank holds the whole model. Trains in one process; more ranks may only evaluate."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from astra.weights import TorchWeights

WEIGHTS = TorchWeights()


class TorchStepper:
    """A plain optimiser with gradient clipping, over whole or FSDP2-sharded parameters."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        state = self.optimizer.state[parameter]
        return (
            WEIGHTS.read(parameter),
            WEIGHTS.read(state["exp_avg"]),
            WEIGHTS.read(state["exp_avg_sq"]),
        )

    def restore(
        self, step: int, states: Iterable[tuple[nn.Parameter, Tensor, Tensor, Tensor]]
    ) -> None:
        for parameter, trained, *moments in states:
            WEIGHTS.write(parameter, trained)
            state = {"step": torch.tensor(float(step))}
            for kind, value in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                state[kind] = torch.zeros_like(parameter, requires_grad=False)
                WEIGHTS.write(state[kind], value)
            self.optimizer.state[parameter] = state


class SingleEngine(TorchWeights):
    """See engines.base.Engine."""

    sharded = reentrant = False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def load(self, path: str, full: bool = False) -> PreTrainedModel:
        dtype = torch.float32 if full else self.dtype
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).to(
            self.device
        )
        if dtype != self.dtype:
            model.forward = torch.autocast(self.device.type, self.dtype)(model.forward)
        return model.requires_grad_(full)

    @contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        model.eval()
        yield

    def training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> TorchStepper:
        assert dist.get_world_size() == 1, "gradients are not averaged over ranks"
        return TorchStepper(model, optimizer, max_grad_norm)
