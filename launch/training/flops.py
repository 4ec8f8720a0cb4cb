"""What a training makes of its hardware: the arithmetic of a step, the device's peak, and memory."""

import resource
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of torch.cuda.get_device_name(); the first that fits counts.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.25,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a model's forward and backward passes, by what they grow with."""

    token: float
    answer_token: float
    square: float  # of a row's length

    def of(self, lengths: Tensor, answer_tokens: int) -> float:
        """Of rows of these `lengths` with so many counted tokens in all."""
        squares = float(lengths.double().square().sum())
        return (
            self.token * int(lengths.sum())
            + self.answer_token * answer_tokens
            + self.square * squares
        )


def work_of(base: PreTrainedModel) -> Work | None:
    """The arithmetic of training `base`, adapters in it included; None if not all its matrices are Linears'.

    Counted are 2 operations for each multiplication by a weight and token: in the forward pass, for the gradient with
    respect to the input, and, where the weight is trained, for its own. So 4 for each element of a frozen weight and 6
    for each of a trained one; for the output head, per answer token, since no other logits are computed. Attention is
    counted over the lower triangle: scores and their product with the values, 2 L^2 d per layer forward and twice that
    backward. Not counted: norms, activations, softmax, the optimiser, padding, and what gradient checkpointing computes
    anew. The first layer counts as if its input's gradient were computed.
    """
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    of_head = (
        set() if head is None else set(head.modules())
    )  # an adapter's parts too, if there is one
    token, answer_token = 0, 0
    for module in base.modules():
        own = [
            p for p in module.parameters(recurse=False) if len(getattr(p, "ds_shape", p.shape)) > 1
        ]
        if isinstance(module, nn.Linear):
            flops = (
                (6 if module.weight.requires_grad else 4) * module.in_features * module.out_features
            )
            token, answer_token = (
                (token, answer_token + flops)
                if module in of_head
                else (token + flops, answer_token)
            )
        elif own and not isinstance(module, nn.Embedding):
            return None
    heads, layers = (
        getattr(config, "num_attention_heads", None),
        getattr(config, "num_hidden_layers", None),
    )
    if head is None or not heads or not layers:
        return None
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Work(token, answer_token, 6 * layers * width)


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that `device` can do at most with bf16 matrices, from the table; None for other dtypes and devices."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on its GPU by PyTorch's count, else resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
