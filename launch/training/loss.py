"""The training loss: cross-entropy where the next token is part of an answer, and logits nowhere else.

With a vocabulary of 128,000 the logits of 4 rows of 512 tokens are a GiB in fp32, and their gradient another. Here the
head sees the hidden states of counted positions only, a chunk at a time, and what a chunk adds to the gradients is
computed while its logits are there: no more than one chunk of them is ever held, forward or backward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Logits held at once: 16 MiB in fp32, which a CPU's caches like, and 128 MiB, enough to keep a GPU busy.
CHUNK_CPU, CHUNK_GPU = 2**22, 2**25


class AnswerLoss(nn.Module):
    """`model` with its loss: what a training's forward passes call, and what engines wrap.

    The model itself runs, with another function in its head for the time. So the hooks by which engines gather weights
    see one call of every module, the head included, on every rank alike.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A head with an adapter, or what a model does to logits after it (soft capping, a scale), needs them as such.
        self.in_chunks = type(model.get_output_embeddings()) is nn.Linear

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy summed over n counted positions: a scalar, fp32, nats; 0 for n = 0.

        No attention mask: rows are padded on the right, so no real token sees padding, and fused causal kernels apply.

        Args:
            input_ids: (rows, tokens), int64.
            positions: (n,), int64, in the flattened `input_ids`: the tokens whose next one counts.
            targets: (n,), int64: those next tokens.
            position_ids: (rows, tokens), int64: in packed rows, each example's from 0.
        """
        inputs = {"input_ids": input_ids, "use_cache": False}
        if position_ids is not None:  # some models take none
            inputs["position_ids"] = position_ids
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        head = base.get_output_embeddings()
        if head is None:
            return _cross_entropy(self.model(**inputs).logits.flatten(0, 1)[positions], targets)
        if (
            self.in_chunks
            and (loss := self._chunked(base, head, positions, targets, inputs)) is not None
        ):
            return loss
        self.in_chunks = False
        whole = head.forward
        with _forward_of(head, lambda hidden: whole(hidden.flatten(0, 1)[positions][None])):
            return _cross_entropy(self.model(**inputs).logits[0], targets)

    def _chunked(
        self, base: nn.Module, head: nn.Linear, positions: Tensor, targets: Tensor, inputs: dict
    ) -> Tensor | None:
        """The loss, computed in the head's place; None if the model does anything to what its head returns."""
        of_head, untouched, whole = [], [], base.forward

        def answer_loss(hidden: Tensor) -> Tensor:
            chunk = CHUNK_CPU if hidden.device.type == "cpu" else CHUNK_GPU
            return chunked_cross_entropy(
                hidden.flatten(0, 1)[positions], head.weight, head.bias, targets, chunk
            )

        def watched(*args: object, **kwargs: object) -> object:
            output = whole(*args, **kwargs)
            untouched.append(output.logits is of_head[-1])
            return output

        with _forward_of(head, answer_loss), _forward_of(base, watched):
            # Registered last, this hook sees what the engine's own hooks make of the head's output.
            hook = head.register_forward_hook(
                lambda _module, _inputs, output: of_head.append(output)
            )
            try:
                output = self.model(**inputs)
            finally:
                hook.remove()
        return output.logits if untouched[-1] else None


@torch.no_grad()
def leak(model: nn.Module, device: torch.device) -> float:
    """How far an example's loss moves, relatively, when the one packed before it is another: 0 if attention is kept
    within each. Collective where the model is sharded.
    """
    losses, example = [], torch.arange(3, 11)
    for other in (1, 2):
        ids = torch.cat([torch.full((8,), other), example]).to(device)
        losses.append(
            AnswerLoss(model)(
                ids[None],
                torch.arange(8, 15, device=device),
                ids[9:],
                torch.arange(8, device=device).repeat(2)[None],
            )
        )
    return float((losses[0] - losses[1]).abs() / losses[0])


@contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`forward` in the place of the module's own, below its hooks."""
    own = module.__dict__.get("forward")  # another library may have put one there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def label_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The same sum with whole logits, for a calibration, which may watch the head itself.

    Both are (rows, tokens), int64; labels of -100 do not count.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits
    return _cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )  # -100 is what PyTorch leaves out


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")` with few logits at a time.

    Args:
        hidden: (n, d). weight: (vocabulary, d). bias: (vocabulary,). targets: (n,), int64. chunk: logits held at once.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss is the last thing of a forward pass, so its gradient is known then, up to a factor."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
    ) -> Tensor:
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if to_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        total = hidden.new_zeros((), dtype=torch.float64)
        rows = max(1, chunk // weight.shape[0])
        for start in range(0, len(hidden), rows):
            part, at = hidden[start : start + rows], targets[start : start + rows, None]
            logits = part @ weight.T if bias is None else torch.addmm(bias, part, weight.T)
            log_p = F.log_softmax(logits.float(), dim=-1)
            del logits
            total -= log_p.gather(1, at).sum(dtype=torch.float64)
            if not any((to_hidden, to_weight, to_bias)):
                continue
            # The gradient with respect to the logits, in the dtype that they have.
            d_logits = (
                log_p.exp_().scatter_add_(1, at, log_p.new_full(at.shape, -1)).to(hidden.dtype)
            )
            if to_hidden:
                d_hidden[start : start + rows] = d_logits @ weight
            if to_weight:
                d_weight += d_logits.T @ part
            if to_bias:
                d_bias += d_logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, factor: Tensor) -> tuple:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if x is None else (x * factor).to(dtype) for x, dtype in pairs), None, None
