"""One module's output second moment `C`, from its group's statistic, as `C = Q small Q^T` of the smallest size."""

from typing import NamedTuple

import torch
from torch import Tensor

from astra.moments import Moment


class Basis(NamedTuple):
    """Orthonormal columns Q, (size, k), of a QR factorisation, kept as its Householder reflectors (LAPACK's geqrf).

    So the complement of Q's range is at hand too, and neither is ever formed whole.
    """

    reflectors: Tensor  # (size, k)
    tau: Tensor  # (k,)

    @property
    def codimension(self) -> int:
        """Dimensions outside of the range."""
        return self.reflectors.shape[0] - self.reflectors.shape[1]

    def times(self, small: Tensor) -> Tensor:
        """`Q small`, (k, n) -> (size, n)."""
        size, k = self.reflectors.shape
        padded = torch.cat([small, small.new_zeros(size - k, small.shape[1])])
        return torch.ormqr(self.reflectors, self.tau, padded)

    def transposed_times(self, large: Tensor) -> Tensor:
        """`Q^T large`, (size, n) -> (k, n)."""
        return torch.ormqr(self.reflectors, self.tau, large, transpose=True)[: len(self.tau)]

    def complement(self, directions: Tensor) -> Tensor:
        """Orthonormal columns outside of Q's range, (size, n): a basis of what `directions` are there."""
        k = len(self.tau)
        beyond = torch.ormqr(self.reflectors, self.tau, directions, transpose=True)[k:]
        columns = torch.linalg.qr(beyond).Q
        return torch.ormqr(
            self.reflectors, self.tau, torch.cat([columns.new_zeros(k, columns.shape[1]), columns])
        )


def extended(weight: Tensor, bias: Tensor | None) -> Tensor:
    """`W' = [W b]`, or W without a bias, in fp64: (d_out, d_in (+ 1))."""
    if bias is None:
        return weight.double()
    return torch.cat([weight.double(), bias.double()[:, None]], 1)


def left_basis(weight: Tensor, bias: Tensor | None) -> Basis | None:
    """A basis of the range of `W'`, where W' is taller than wide; None otherwise."""
    wide = extended(weight, bias)
    return Basis(*torch.geqrf(wide)) if wide.shape[0] > wide.shape[1] else None


def output_moment(
    of: str, moment: Moment, weight: Tensor, bias: Tensor | None, basis: Basis | None = None
) -> tuple[Basis | None, Tensor]:
    """The output second moment `C` of one module as `(Q, small)` with `C = Q small Q^T`, in fp64.

    With `W' = [W b]` and the second moment `S'` of `[x 1]`, `C = W' S' W'^T` (method: shared inputs). Where W' is
    taller than wide, `C` has rank at most k = d_in (+ 1): then `W' = Q R` and `small = R S' R^T`, (k, k), so that the
    d_out - k zero eigenvalues are zero by construction and not by rounding. Otherwise Q is None, for the identity.

    Args:
        of: "input", "output" or "scaled output", what `moment` was summed of.
        weight: (d_out, d_in), any dtype. bias: (d_out,) or None.
        basis: what left_basis(weight, bias) gave, if it is known already.
    """
    second = moment.second()
    if of != "input":
        return None, second
    wide = extended(weight, bias)
    if bias is not None:
        mean = (moment.total / moment.count)[:, None]
        second = torch.cat(
            [torch.cat([second, mean], 1), torch.cat([mean.T, torch.ones_like(mean[:1])], 1)]
        )
    if wide.shape[0] > wide.shape[1]:
        basis = basis or Basis(*torch.geqrf(wide))
        wide = basis.reflectors[: len(basis.tau)].triu()
    small = wide @ second @ wide.T
    return basis, (small + small.T).div_(2)
