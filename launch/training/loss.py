"""The training loss. It and the logits are computed only where the next token belongs to an answer.

With a vocabulary of 128,000 the logits of 4 rows of 512 tokens are a GiB in fp32, and their gradient
another. If the output head is a plain nn.Linear, and the model returns what the head gives, the head
runs on a chunk of the wanted hidden states at a time. The gradients that follow from a chunk are
computed while its logits exist, so only one chunk of logits is held, forward or backward. Otherwise
the logits of all answer tokens are held; of a model that names no head, those of all tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from astra.moments import Batch
from launch.runtime.compat.transformers_parts import without_packing_check

# Logits held at once: 16 MiB in fp32, which a CPU's caches like, and 128 MiB, enough to keep a GPU busy.
CHUNK_CPU, CHUNK_GPU = 2**22, 2**25


class AnswerLoss(nn.Module):
    """A model that returns its training loss. Training calls it, and engines wrap it.

    fp32 adapters of a bf16 base are multiplied in bf16, by autocast (see `in_bf16`). The context is
    entered here because DeepSpeed's engine leaves one that was entered around it.

    The model itself runs, with another function in the place of its head's `forward`. So the hooks
    by which engines gather weights see one call of every module, the head included, on every rank.
    """

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        """Wrap `model`.

        Args:
            chunk: logits held at once; what suits the device where None.
        """
        super().__init__()
        self.model, self.chunk = model, chunk
        # A head with an adapter cannot run in chunks. Nor can a model that does something to the
        # logits after the head, such as soft capping; the first forward pass finds that out.
        self.in_chunks = type(model.get_output_embeddings()) is nn.Linear
        self.autocast = has_bf16_products(model)

    def forward(
        self,
        input_ids: Tensor,
        loss_indices: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the cross-entropy summed over n answer tokens, in nats.

        No attention mask is needed: sequences are padded on the right, so no real token sees
        padding, and fused causal kernels apply.

        Args:
            input_ids: (sequences, tokens), int64; see data.batches.TrainBatch.
            loss_indices: (n,), int64: places in the flattened `input_ids` whose next token counts.
            targets: (n,), int64: those next tokens.
            position_ids: as input_ids, from 0 in each packed example.

        Returns:
            A scalar, fp32; 0 for n = 0.
        """
        # Every weight is used once in a pass, so a cache of cast ones would only hold memory.
        autocast = torch.autocast(
            input_ids.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False
        )
        with autocast, without_packing_check(position_ids is None):
            return self._compute(input_ids, loss_indices, targets, position_ids)

    def _compute(
        self, input_ids: Tensor, loss_indices: Tensor, targets: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        inputs = {"input_ids": input_ids, "use_cache": False}
        if position_ids is not None:  # some models take none
            inputs["position_ids"] = position_ids
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        head = base.get_output_embeddings()
        if head is None:
            logits = self.model(**inputs).logits.flatten(0, 1)
            return _sum_cross_entropy(logits[loss_indices], targets)
        if self.in_chunks:
            cpu_state, device_states = torch.get_rng_state(), get_device_states(input_ids)
            loss = self._compute_in_chunks(base, head, loss_indices, targets, inputs)
            if loss is not None:
                return loss
            self.in_chunks = False
            # A launch finds this out in its first pass. Dropout is to be as without that pass, so
            # that a resumed run equals the undisturbed one.
            torch.set_rng_state(cpu_state)
            set_device_states(*device_states, device_type=input_ids.device.type)
        own_forward = head.forward

        def selected_logits(hidden: Tensor) -> Tensor:
            return own_forward(hidden.flatten(0, 1)[loss_indices][None])

        with _replace_forward(head, selected_logits):
            return _sum_cross_entropy(self.model(**inputs).logits[0], targets)

    def _compute_in_chunks(
        self,
        base: nn.Module,
        head: nn.Linear,
        loss_indices: Tensor,
        targets: Tensor,
        inputs: dict,
    ) -> Tensor | None:
        """Compute the loss in the head's place.

        The head returns the scalar loss instead of logits, and the model hands it on as its own
        `logits`. If that is another object, the model changes its logits.

        Returns:
            None if the model changes what its head returns.
        """
        head_outputs: list[Tensor] = []
        own_forward = base.forward
        untouched = False

        def compute_head_loss(hidden: Tensor) -> Tensor:
            chunk = CHUNK_CPU if hidden.device.type == "cpu" else CHUNK_GPU
            chunk = self.chunk or chunk
            selected = hidden.flatten(0, 1)[loss_indices]
            return compute_chunked_cross_entropy(selected, head.weight, head.bias, targets, chunk)

        def watched_forward(*args: object, **kwargs: object) -> object:
            nonlocal untouched
            output = own_forward(*args, **kwargs)
            untouched = output.logits is head_outputs[-1]
            return output

        with _replace_forward(head, compute_head_loss), _replace_forward(base, watched_forward):
            # Registered last, this hook sees what the engine's own hooks make of the head's output.
            hook = head.register_forward_hook(
                lambda _module, _inputs, output: head_outputs.append(output)
            )
            try:
                output = self.model(**inputs)
            finally:
                hook.remove()
        return output.logits if untouched else None


def has_bf16_products(model: nn.Module) -> bool:
    """Return whether training multiplies in bf16 by fp32 adapters: on a bf16 base, but not DoRA's.

    DoRA divides by the norm of W + s B A, which bf16 would round.
    """
    if not isinstance(model, PeftModel) or model.get_base_model().dtype != torch.bfloat16:
        return False
    return not any("lora_magnitude_vector" in name for name, _ in model.named_parameters())


@contextmanager
def in_bf16(model: nn.Module) -> Iterator[None]:
    """Within the context, PEFT leaves the inputs of adapters in bf16 where AnswerLoss autocasts.

    PEFT would make an fp32 copy of every input, for autocast to make a bf16 copy of that. It is one
    context around all passes, since checkpointing repeats a forward pass in the backward pass.
    """
    with disable_input_dtype_casting(model, active=has_bf16_products(model)):
        yield


@contextmanager
def in_own_dtypes(model: nn.Module) -> Iterator[None]:
    """Within the context, which may be within `in_bf16`, adapters compute as outside of training.

    PEFT then makes the inputs of fp32 adapters fp32.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


@torch.no_grad()
def measure_packing_leak(model: nn.Module, device: torch.device) -> float:
    """Measure how far an example's loss moves, relatively, when the one packed before it changes.

    Returns:
        0 if attention is kept within each example. Collective where the model is sharded.
    """
    losses = []
    example = torch.arange(3, 11)
    for other in (1, 2):
        ids = torch.cat([torch.full((8,), other), example]).to(device)
        loss = AnswerLoss(model)(
            input_ids=ids[None],
            loss_indices=torch.arange(8, 15, device=device),
            targets=ids[9:],
            position_ids=torch.arange(8, device=device).repeat(2)[None],
        )
        losses.append(loss)
    return float((losses[0] - losses[1]).abs() / losses[0])


@contextmanager
def _replace_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Put `forward` in the place of the module's own, below its hooks."""
    own = module.__dict__.get("forward")  # another library may have put one there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _sum_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def sum_label_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the sum of AnswerLoss.forward from the logits of every token.

    For a calibration, which may observe the head, so the head must run as it is.

    Args:
        batch: with `labels`; those of -100 do not count, as PyTorch's cross-entropy has it.
    """
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return _sum_cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def compute_chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
) -> Tensor:
    """Compute `F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")`.

    Args:
        hidden: (n, d).
        weight: (vocabulary, d).
        bias: (vocabulary,) or None.
        targets: (n,), int64.
        chunk: logits held at once.

    Returns:
        A scalar, fp32, summed in fp64.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradients are computed in the forward pass, chunk by chunk.

    The loss is the last thing that a forward pass computes, so its gradient is known then, up to
    the factor that the backward pass brings.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        total = hidden.new_zeros((), dtype=torch.float64)
        size = max(1, chunk // weight.shape[0])
        for start in range(0, len(hidden), size):
            part = hidden[start : start + size]
            wanted = targets[start : start + size, None]
            logits = part @ weight.T if bias is None else torch.addmm(bias, part, weight.T)
            log_p = F.log_softmax(logits.float(), dim=-1)
            del logits
            total -= log_p.gather(1, wanted).sum(dtype=torch.float64)
            if not any((needs_hidden, needs_weight, needs_bias)):
                continue
            # d loss / d logits = softmax - one-hot of the target, in the logits' own dtype.
            minus_one = log_p.new_full(wanted.shape, -1)
            d_logits = log_p.exp_().scatter_add_(1, wanted, minus_one).to(hidden.dtype)
            if needs_hidden:
                d_hidden[start : start + size] = d_logits @ weight
            if needs_weight:
                d_weight += d_logits.T @ part
            if needs_bias:
                d_bias += d_logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, factor: Tensor) -> tuple:
        gradients = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            gradients.append(None if gradient is None else (gradient * factor).to(dtype))
        return *gradients, None, None  # targets and chunk have no gradients
