"""Plain LoRAs for the original base that mean the same to every loader.

All modules have one rank R, and alpha = R, so the scale is 1 by every rule: PEFT and vLLM take
alpha / r, llama.cpp takes alpha over the rows of A. The scaling s of the training is folded into B,
and a module of a smaller rank is padded with zeros. A plain LoRA of a smaller rank is made by
truncating the singular values of each module's change.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import pad

from astra.adapter import Factors, save_adapter
from astra.eigen import choose_signs


def get_scaling(config: LoraConfig) -> float:
    """Return s, which is alike for all modules of an adapter that attach_adapters made."""
    divisor = math.sqrt(config.r) if config.use_rslora else config.r
    return config.lora_alpha / divisor


def join_factors(trained: Factors, initial: Factors | None, scaling: float) -> Factors:
    """Return `s (B A - B0 A0)` as the factors of one product, in fp64.

    They are [A; A0], (2r, d_in), and s [B, -B0], (d_out, 2r); or A and s B without initial factors,
    which B0 = 0 leaves out of the product.
    """
    a, b = trained.a.double(), scaling * trained.b.double()
    if initial is None:
        return Factors(a, b)
    return Factors(
        torch.cat([a, initial.a.double()]), torch.cat([b, -scaling * initial.b.double()], 1)
    )


def to_plain_lora(
    trained: Mapping[str, Factors], initial: Mapping[str, Factors], scaling: float
) -> dict[str, Factors]:
    """Return the change of every module as a LoRA of one rank and of scale 1.

    A is as it was trained. B is s B, rounded once to its dtype; not at all if s is a power of two.

    Args:
        trained: A and B by module name.
        initial: A0 and B0, where the training began on W_res; empty where it began on the base.
        scaling: s.
    """
    plain = {}
    for name, factors in trained.items():
        a, b = join_factors(factors, initial.get(name), scaling)
        plain[name] = Factors(a.to(factors.a.dtype), b.to(factors.b.dtype))
    return pad_to_one_rank(plain)


def pad_to_one_rank(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Pad with zeros to the largest rank: rows of A and columns of B, which add nothing."""
    rank = max(len(a) for a, _ in factors.values())
    padded = {}
    for name, (a, b) in factors.items():
        missing = rank - len(a)
        padded[name] = Factors(pad(a, (0, 0, 0, missing)), pad(b, (0, missing)))
    return padded


def save_plain_lora(
    folder: Path,
    config: LoraConfig,
    base: str,
    factors: Mapping[str, Factors],
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write factors of one rank and of scale 1 to `folder` in PEFT's format.

    Args:
        config: of the training, for the targets.
        base: name of the base model.
        head: see `save_adapter`.
    """
    plain = copy.deepcopy(config)
    plain.r = plain.lora_alpha = len(next(iter(factors.values())).a)
    plain.rank_pattern, plain.alpha_pattern = {}, {}
    plain.use_rslora = False
    save_adapter(folder, plain, base, factors, head=head)


class Truncation(NamedTuple):
    """A product B A, cut after its largest singular values."""

    kept: Factors  # of the rank that was asked for, in the dtype of the product's own factors
    dropped: Factors  # the rest, so that B A is the sum of both; of rank 0 if nothing is left
    norm: float  # Frobenius norm of the product
    error: float  # Frobenius norm of what was dropped


def truncate_product(product: Factors, rank: int, dtype: torch.dtype) -> Truncation:
    """Return the best approximation of B A of the given rank, with what it leaves out.

    B A = Q_B (R_B R_A^T) Q_A^T by QR decompositions of B and of A^T. So the singular values are
    those of a matrix of R x R, and no matrix of the weight's shape is made. All is in fp64.

    Args:
        product: A, (R, d_in), and B, (d_out, R).
        rank: of the result. Where the product has a smaller one, the rest is zeros.
        dtype: of the results.
    """
    q_b, r_b = torch.linalg.qr(product.b.double())
    q_a, r_a = torch.linalg.qr(product.a.double().T)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    left = q_b @ u
    roots = choose_signs(left) * values.sqrt()
    b = (left * roots).to(dtype)
    a = (roots[:, None] * (vh @ q_a.T)).to(dtype)
    missing = max(rank - len(values), 0)
    kept = Factors(pad(a[:rank], (0, 0, 0, missing)), pad(b[:, :rank], (0, missing)))
    dropped = Factors(a[rank:], b[:, rank:])
    return Truncation(kept, dropped, values.norm().item(), values[rank:].norm().item())
