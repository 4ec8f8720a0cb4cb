"""Sums of one rank that a test and its worker script both make."""

import torch
from torch import Tensor, nn

from astra.gradients import Gradient
from astra.moments import Moment
from astra.reduction import Sums

SIZES = (300, 7, 513)  # of moments: two, one and three blocks of columns
SMALL_BUCKET = 40_000  # bytes: below a block, above a vector


def make_sums(rank: int) -> list[Sums]:
    """Return sums over random tokens of a rank: three moments and a gradient."""
    generator = torch.Generator().manual_seed(rank)
    device, sums = torch.device("cpu"), []
    for size in SIZES:
        moment = Moment.zeros(size, device)
        moment.add(torch.randn(20 + rank, size, generator=generator, dtype=torch.float64))
        sums.append(moment)
    gradient = Gradient.zeros(nn.Linear(90, 70), device)
    gradient.total.normal_(generator=generator)
    gradient.count += 5
    return [*sums, gradient]


def name_tensors(kind: str, sums: list[Sums]) -> dict[str, Tensor]:
    """Return all tensors of `sums` by kind, group and place."""
    tensors = {}
    for group, group_sums in enumerate(sums):
        for place, tensor in enumerate(group_sums.tensors()):
            tensors[f"{kind}.{group}.{place}"] = tensor.clone()
    return tensors
