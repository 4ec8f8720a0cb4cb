"""Add up the ranks' sums, so that every rank or each group's owner has the sums over all tokens.

Each rank's `Moment` or `Gradient` holds fp64 sums over its own tokens. Added over the ranks they
are what one process would have summed, up to the order of fp64 additions:

* "all": an all-reduce. Every rank has the same sums, and `check_sums_agree` compares them before
  anything is solved.
* "owner": a reduce to the rank that solves the group. No other rank can check the sums. A ring or
  tree as NCCL's sends half of what its all-reduce sends, by its algorithm; gloo was measured to
  send more (bench/calibration.py).

Tensors are sent in buckets: small ones are copied into one flat buffer, large ones are sent in
slices of their own memory. A bucket never holds tensors of two groups. gloo and NCCL choose the
order of additions of an entry by its place in the bucket and the bucket's size, so this keeps the
sums of a group the same to the last bit however the groups are divided into windows. Between "all"
and "owner" two ranks give the same bits, because a + b = b + a; more ranks give the same up to
rounding.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from astra.errors import AstraError
from astra.moments import Group, is_distributed

Reduction = Literal["all", "owner"]

BUCKET_BYTES = 64 * 2**20  # most that is sent at once, and copied for it
AGREEMENT = 1e-9  # relative; ranks that added up the same numbers differ by 0


class Sums(Protocol):
    """Sums over tokens: a Moment or a Gradient."""

    def tensors(self) -> list[Tensor]: ...


def reduce_sums(
    sums: Sequence[Sums],
    owners: Sequence[int],
    reduction: Reduction = "all",
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Add up each of `sums` over the ranks, in place. Collective.

    Args:
        sums: one for each group, the same groups on every rank; their tensors are contiguous.
        owners: the owner rank of each group.
        reduction: with "owner", only the owner has the sums afterwards; on the other ranks the
            values are undefined and to be dropped.
        bucket_bytes: most bytes of a bucket, which is also the memory that is needed besides.
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return
    for group_sums, owner in zip(sums, owners, strict=True):
        for pieces in _fill_buckets(group_sums.tensors(), bucket_bytes):
            # A bucket of one piece is sent from where it is.
            bucket = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            if reduction == "all":
                dist.all_reduce(bucket)
            else:
                dist.reduce(bucket, owner)
            if len(pieces) > 1:
                for piece, total in zip(pieces, bucket.split(list(map(len, pieces))), strict=True):
                    piece.copy_(total)


def _fill_buckets(tensors: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Yield the tensors as lists of flat views that together have at most `bucket_bytes`."""
    pieces: list[Tensor] = []
    free = capacity = max(1, bucket_bytes // tensors[0].element_size())  # numbers
    for tensor in tensors:
        for piece in tensor.view(-1).split(capacity):
            if len(piece) > free:
                yield pieces
                pieces, free = [], capacity
            pieces.append(piece)
            free -= len(piece)
    yield pieces


def check_sums_agree(sums: Sequence[Sums], groups: Sequence[Group]) -> None:
    """Check that every rank has the same sums after an all-reduce. Collective.

    GPUs whose peer-to-peer transfers are broken, or a faulty network card, add up wrong numbers
    without an error.

    Args:
        sums: one for each of `groups`, over all ranks.

    Raises:
        AstraError: on every rank, naming the first module whose sums differ.
    """
    if not is_distributed() or dist.get_world_size() == 1 or not sums:
        return
    squares = torch.stack([_sum_squares(group_sums) for group_sums in sums])
    # Sums that are not finite on every rank alike are found when they are solved.
    lowest = torch.nan_to_num(squares, nan=0.0, posinf=0.0)
    highest = lowest.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    differs = (highest - lowest > AGREEMENT * highest).tolist()
    if any(differs):
        name = groups[differs.index(True)].modules[0]
        raise AstraError(
            f"{name}: its calibration sums differ between ranks after they were added up; a GPU or "
            "the network returns wrong values: check them (with NCCL_P2P_DISABLE=1 GPUs exchange "
            "data through main memory)"
        )


def _sum_squares(sums: Sums) -> Tensor:
    """Return the sum of squares of all numbers in `sums`, a scalar tensor."""
    return torch.stack([tensor.square().sum() for tensor in sums.tensors()]).sum()
