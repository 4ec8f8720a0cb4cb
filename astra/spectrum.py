"""What a calibration saw of each module: its eigenvalues in figures, and the ranks that follow from them."""

import math
from collections.abc import Mapping

from torch import Tensor

from astra.errors import AstraError


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the normalised eigenvalues (Roy and Vetterli, 2007): 1 to d; 0 for a moment of zeros."""
    total = spectrum.sum()
    if total <= 0:
        return 0.0
    shares = spectrum[spectrum > 0] / total
    return math.exp(-(shares * shares.log()).sum().item())


def figures(spectrum: Tensor, values: Tensor) -> dict[str, float | int | None]:
    """One module in numbers.

    Args:
        spectrum: (d_out,), all eigenvalues, ascending. values: (r,), those of the chosen eigenvectors.
    """
    trace, rank = spectrum.sum().item(), len(values)
    first = spectrum[:rank].sum().item()
    beyond = spectrum[rank].item() if rank < len(spectrum) else None
    return {
        "size": len(spectrum),
        "rank": rank,
        "trace": trace,
        "zero_eigenvalues": int((spectrum == 0).sum()),
        "effective_rank": effective_rank(spectrum),
        "chosen_energy_share": values.sum().item() / trace if trace else None,
        "tail_energy_share": first / trace if trace else None,
        # How far the tail's largest eigenvalue is from the next: near 1 the tail is hardly determined.
        "gap_at_rank": spectrum[rank - 1].item() / beyond if beyond else None,
    }


def allocate(effective: Mapping[str, float], most: Mapping[str, int], rank: int) -> dict[str, int]:
    """Ranks in proportion to log(1 + effective rank), at least 1, at most `most`, that add up to rank x modules.

    Real-valued shares first, scaled so that the clipped ones add up; then the largest remainders are rounded up, the
    model's order deciding ties.

    Raises AstraError if even `most` everywhere is less than the budget.
    """
    budget = rank * len(effective)
    if sum(most.values()) < budget:
        raise AstraError(
            f"adapter.rank: {rank} for each module is above what effective_rank may give; lower it"
        )
    weights = {name: max(math.log1p(value), 1e-12) for name, value in effective.items()}

    def shares(scale: float) -> dict[str, float]:
        return {name: min(max(scale * weight, 1.0), most[name]) for name, weight in weights.items()}

    low, high = 0.0, max(most.values()) / min(weights.values())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle).values()) < budget else (low, middle)
    real = shares(high)
    ranks = {name: math.floor(value) for name, value in real.items()}
    by_remainder = sorted(
        (name for name in real if ranks[name] < most[name]), key=lambda n: ranks[n] - real[n]
    )
    for name in by_remainder[: budget - sum(ranks.values())]:
        ranks[name] += 1
    return ranks
