"""Intervals for accuracies."""

import math

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, as fractions (Wilson 1927).

    Raises ValueError unless 0 <= correct <= n and n > 0.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} correct of {n} is no proportion")
    share = correct / n
    centre = share + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    # The ends are exact for 0 and n, which rounding would miss.
    return (centre - spread) / scale if correct else 0.0, (
        centre + spread
    ) / scale if correct < n else 1.0


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k: that of k of `samples`, `correct` of them right, one is (Chen et al. 2021).

    Raises ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {correct} of them right, is not defined")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of a paired difference: of problems that one side alone gets right (McNemar 1947)."""
    n, least = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


def paired_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the second's accuracy less the first's on the same n problems, as fractions.

    Wald's with a pseudo-count of 1/2 for each kind of pair (Agresti and Min 2005), good for few differing pairs too.
    """
    a, b, total = only_first + 0.5, only_second + 0.5, n + 2
    difference = (b - a) / total
    spread = Z95 * math.sqrt((a + b) - (b - a) ** 2 / total) / total
    return max(-1.0, difference - spread), min(1.0, difference + spread)
