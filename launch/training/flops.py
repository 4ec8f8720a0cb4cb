"""What a training makes of its hardware: a step's arithmetic, and the device's peak."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from launch.runtime.compat.deepspeed_parts import get_full_shape
from launch.runtime.gpus import find_gpu


@dataclass(frozen=True)
class FlopCounts:
    """Floating-point operations of a model's forward and backward passes, by what they grow with."""

    per_token: float
    per_answer_token: float
    per_squared_length: float  # of an example's length in tokens: attention

    def count_step(self, lengths: Tensor, num_answer_tokens: int) -> float:
        """Count the operations of one step.

        Args:
            lengths: (examples,), tokens of each.
            num_answer_tokens: of all of them together.
        """
        squares = float(lengths.double().square().sum())
        return (
            self.per_token * int(lengths.sum())
            + self.per_answer_token * num_answer_tokens
            + self.per_squared_length * squares
        )


def count_training_flops(base: PreTrainedModel) -> FlopCounts | None:
    """Count the arithmetic of training `base`, with the adapters in it.

    A multiplication by one weight for one token is 2 operations. It is done in the forward pass, for
    the gradient with respect to the input, and, where the weight is trained, for its own gradient:
    4 operations for each element of a frozen weight and 6 for each of a trained one. The output
    head counts per answer token, since no other logits are computed. Attention counts over the
    lower triangle: scores and their product with the values, 2 L^2 d per layer forward and twice
    that backward.

    Not counted: norms, activations, softmax, the optimiser, padding, and what gradient
    checkpointing computes again. The first layer counts as if its input's gradient were computed.

    Returns:
        None where the model has matrices that are not those of nn.Linear or nn.Embedding.
    """
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    head_modules = set() if head is None else set(head.modules())  # with an adapter's parts
    per_token, per_answer_token = 0, 0
    for module in base.modules():
        if isinstance(module, nn.Linear):
            factor = 6 if module.weight.requires_grad else 4
            flops = factor * module.in_features * module.out_features
            if module in head_modules:
                per_answer_token += flops
            else:
                per_token += flops
        elif _has_matrices(module) and not isinstance(module, nn.Embedding):
            return None
    num_heads = getattr(config, "num_attention_heads", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if head is None or not num_heads or not num_layers:
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return FlopCounts(per_token, per_answer_token, 6 * num_layers * num_heads * head_size)


def _has_matrices(module: nn.Module) -> bool:
    """Return whether a module has parameters of two or more dimensions of its own."""
    return any(len(get_full_shape(p)) > 1 for p in module.parameters(recurse=False))


def find_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Look up the FLOP/s that `device` can do at most with bf16 matrices.

    Returns:
        None for other dtypes, and for devices that are not in launch.runtime.gpus.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.bf16_tflops * 1e12 if gpu is not None and gpu.bf16_tflops else None
