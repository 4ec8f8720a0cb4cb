"""Form the second moment of one module's outputs, `C = 1/n sum_t y_t y_t^T`, from its group's sums.

For `y = W x + b` write `y = W' x'` with `W' = [W b]` and `x' = [x; 1]`; without a bias, W' is W and
x' is x. Then `C = W' S' W'^T` with `S' = 1/n sum_t x'_t x'_t^T`, which the second moment and the
mean of x determine. So modules that read the same x share one sum.

C is returned as (Q, core) with `C = Q core Q^T`. If W' has k columns and more rows than columns,
the rank of C is at most k. The QR factorisation `W' = Q R` then gives `core = R S' R^T`, (k, k).
The eigenproblem is smaller, and the other d_out - k eigenvalues of C are exactly zero instead of
rounding noise. Otherwise Q is None, which stands for the identity, and core is C itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from astra.moments import Moment, Statistic


class Basis(NamedTuple):
    """Orthonormal columns Q, (size, k) with size > k, from a QR factorisation.

    Q is stored as the Householder reflectors that LAPACK's geqrf returns. They also describe the
    orthogonal complement of Q's columns, and neither Q nor its complement is ever formed as a
    matrix.
    """

    reflectors: Tensor  # (size, k), fp64, as torch.geqrf returns it; R is in its upper triangle
    tau: Tensor  # (k,), fp64

    @property
    def codimension(self) -> int:
        """Dimension of the orthogonal complement of Q's columns: size - k."""
        return self.reflectors.shape[0] - self.reflectors.shape[1]

    def triangle(self) -> Tensor:
        """Return R of the QR factorisation, (k, k)."""
        return self.reflectors[: len(self.tau)].triu()

    def multiply(self, inner: Tensor) -> Tensor:
        """Return `Q inner`: (k, n) -> (size, n)."""
        size, k = self.reflectors.shape
        padded = torch.cat([inner, inner.new_zeros(size - k, inner.shape[1])])
        return torch.ormqr(self.reflectors, self.tau, padded)

    def multiply_transposed(self, outer: Tensor) -> Tensor:
        """Return `Q^T outer`: (size, n) -> (k, n)."""
        rotated = torch.ormqr(self.reflectors, self.tau, outer, transpose=True)
        return rotated[: len(self.tau)]

    def span_in_complement(self, directions: Tensor) -> Tensor:
        """Return orthonormal columns, (size, n), in the orthogonal complement of Q's columns.

        They span the projection of `directions`, (size, n), onto the complement. n is at most
        `codimension`.
        """
        k = len(self.tau)
        # The reflectors' product is the square matrix H = [Q, basis of the complement].
        rotated = torch.ormqr(self.reflectors, self.tau, directions, transpose=True)
        columns = torch.linalg.qr(rotated[k:]).Q
        padded = torch.cat([columns.new_zeros(k, columns.shape[1]), columns])
        return torch.ormqr(self.reflectors, self.tau, padded)


def find_basis(weight: Tensor, bias: Tensor | None) -> Basis | None:
    """Return Q of `W' = Q R` if W' has more rows than columns, else None.

    Args:
        weight: (d_out, d_in), any dtype.
        bias: (d_out,) or None.
    """
    extended = _append_bias(weight, bias)
    num_rows, num_columns = extended.shape
    if num_rows <= num_columns:
        return None
    reflectors, tau = torch.geqrf(extended)
    return Basis(reflectors, tau)


def form_output_moment(
    statistic: Statistic,
    moment: Moment,
    weight: Tensor,
    bias: Tensor | None,
    basis: Basis | None = None,
) -> tuple[Basis | None, Tensor]:
    """Return one module's output second moment as (Q, core), fp64, with `C = Q core Q^T`.

    Args:
        statistic: which vectors `moment` sums: "input", "output" or "scaled output".
        weight: (d_out, d_in), any dtype.
        bias: (d_out,) or None.
        basis: find_basis(weight, bias), if the caller has computed it already.
    """
    second_moment = moment.second_moment()
    if statistic != "input":
        return None, second_moment
    if bias is not None:
        mean = (moment.total / moment.count)[:, None]
        second_moment = _append_mean(second_moment, mean)  # S'
    basis = basis or find_basis(weight, bias)
    factor = _append_bias(weight, bias) if basis is None else basis.triangle()  # W' or R
    core = factor @ second_moment @ factor.T
    # Rounding makes core slightly asymmetric; eigensolvers read one triangle only.
    return basis, (core + core.T).div_(2)


def _append_mean(second_moment: Tensor, mean: Tensor) -> Tensor:
    """Return the second moment of x' = [x; 1], `[[S, mean], [mean^T, 1]]`: (d + 1, d + 1)."""
    one = torch.ones_like(mean[:1])
    upper = torch.cat([second_moment, mean], 1)
    lower = torch.cat([mean.T, one], 1)
    return torch.cat([upper, lower])


def _append_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `W' = [W b]`, or W without a bias, in fp64: (d_out, d_in (+ 1))."""
    if bias is None:
        return weight.double()
    return torch.cat([weight.double(), bias.double()[:, None]], 1)
