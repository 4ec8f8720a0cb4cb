"""Summarise the eigenvalues of a module's output moment, and allocate LoRA ranks by them."""

import math
from collections.abc import Mapping

from torch import Tensor

from astra.errors import AstraError


def compute_effective_rank(spectrum: Tensor) -> float:
    """Return exp(entropy) of the eigenvalues divided by their sum (Roy and Vetterli, 2007).

    It is between 1 and d, or 0 if all eigenvalues are zero.

    Args:
        spectrum: (d,), eigenvalues, none negative.
    """
    total = spectrum.sum()
    if total <= 0:
        return 0.0
    shares = spectrum[spectrum > 0] / total
    return math.exp(-(shares * shares.log()).sum().item())


def summarise_spectrum(spectrum: Tensor, values: Tensor) -> dict[str, float | int | None]:
    """Return statistics of one module's eigenvalues by name; None where one is not defined.

    Args:
        spectrum: (d_out,), all eigenvalues, ascending.
        values: (r,), those of the chosen eigenvectors.
    """
    trace = spectrum.sum().item()
    lora_rank = len(values)
    # The tail: the r smallest eigenvalues, which need not be the chosen ones.
    tail_sum = spectrum[:lora_rank].sum().item()
    tail_end = spectrum[lora_rank - 1].item()
    following = spectrum[lora_rank].item() if lora_rank < len(spectrum) else None
    return {
        "size": len(spectrum),
        "rank": lora_rank,
        "trace": trace,
        "zero_eigenvalues": int((spectrum == 0).sum()),
        "effective_rank": compute_effective_rank(spectrum),
        "chosen_energy_share": values.sum().item() / trace if trace else None,
        "tail_energy_share": tail_sum / trace if trace else None,
        # Near 1 the calibration samples hardly determine which eigenvectors are in the tail.
        "gap_at_rank": tail_end / following if following else None,
    }


def allocate_ranks(
    effective_ranks: Mapping[str, float], max_ranks: Mapping[str, int], lora_rank: int
) -> dict[str, int]:
    """Return each module's LoRA rank, about proportional to log(1 + effective rank).

    The ranks add up to the budget, `lora_rank` for each module. The authors' code has this as an
    option. Proportional ranks are scaled and clipped to 1 and `max_ranks`, with the scale for which
    they add up to the budget. Then all are rounded down, and those with the largest remainders are
    raised by 1 until the budget is used; of equal remainders the first in the model.

    Args:
        effective_ranks: module name -> compute_effective_rank of its spectrum.
        max_ranks: module name -> the largest rank it may get.
        lora_rank: mean of the ranks.

    Raises:
        AstraError: `max_ranks` add up to less than the budget.
    """
    budget = lora_rank * len(effective_ranks)
    if sum(max_ranks.values()) < budget:
        raise AstraError(
            f"{lora_rank} for each module is above what effective_rank may give; lower it", "rank"
        )
    # Zero weights would divide by 0 below.
    weights = {name: max(math.log1p(value), 1e-12) for name, value in effective_ranks.items()}

    def clip_ranks(scale: float) -> dict[str, float]:
        clipped = {}
        for name, weight in weights.items():
            clipped[name] = min(max(scale * weight, 1.0), max_ranks[name])
        return clipped

    # Bisection for the scale: the sum of the ranks grows with it. 200 halvings exhaust fp64.
    low, high = 0.0, max(max_ranks.values()) / min(weights.values())
    for _ in range(200):
        middle = (low + high) / 2
        if sum(clip_ranks(middle).values()) < budget:
            low = middle
        else:
            high = middle
    real_ranks = clip_ranks(high)
    ranks = {name: math.floor(value) for name, value in real_ranks.items()}
    # Largest remainders first. The sort is stable, so ties stay in the model's order.
    raisable = [name for name in ranks if ranks[name] < max_ranks[name]]
    raisable.sort(key=lambda name: ranks[name] - real_ranks[name])
    num_left = budget - sum(ranks.values())
    for name in raisable[:num_left]:
        ranks[name] += 1
    return ranks
