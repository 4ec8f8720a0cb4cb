"""Intervals of accuracies and of their differences, and pass@k."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
FEW = 5  # problems


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of `correct` out of `n`, as fractions (Wilson 1927).

    Neither needs to be whole: see `clustered_interval`.

    Raises:
        ValueError: not 0 <= correct <= n, or n is 0.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} correct of {n} is no proportion")
    share = correct / n
    centre = share + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    # The ends for 0 and n are exact; rounding would miss them.
    low = (centre - spread) / scale if correct else 0.0
    high = (centre + spread) / scale if correct < n else 1.0
    return low, high


def clustered_interval(shares: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `shares`, the share of right samples of each problem.

    Samples of one problem are alike, so the interval is Wilson's of the effective number of
    samples: the number of independent ones whose mean varies as much as this one (Kish 1965; Franco
    et al. 2019, Journal of Survey Statistics and Methodology 7, 334-364, compare such intervals).
    That is between the number of problems and, where every problem has as many, the number of
    samples. With one sample a problem it is Wilson's interval itself, and it always holds the mean.
    Shares that are equal by chance would look like independent samples, so with fewer than FEW
    problems the effective number is that of the problems.

    Args:
        shares: of each problem, from 0 to 1.
        counts: samples of each problem.

    Raises:
        ValueError: there is no problem.
    """
    n = len(shares)
    if not n:
        raise ValueError("no problems have no mean")
    mean = math.fsum(shares) / n
    variance = math.fsum((share - mean) ** 2 for share in shares) / n
    # If samples were independent: the mean of shares varies by their 1 / count.
    most = n**2 / math.fsum(1 / count for count in counts)
    effective = most if not variance else n * mean * (1 - mean) / variance
    if n < FEW or mean in (0.0, 1.0):  # nothing says how alike the samples are
        effective = n
    effective = min(max(effective, n), most)
    correct = math.fsum(shares) if effective == n else mean * effective
    return wilson_interval(correct, effective)


def mean_interval(
    means: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Return the 95 % interval of the unweighted mean of independent means.

    Each side adds up the squared distances from the means to their own limits, so the interval
    holds the mean and stays within 0 and 1 (MOVER: Zou and Donner 2008, Statistics in Medicine 27,
    1693-1702).

    Args:
        intervals: the 95 % interval of each mean.
    """
    n = len(means)
    mean = math.fsum(means) / n
    below = math.hypot(*(m - low for m, (low, _) in zip(means, intervals, strict=True)))
    above = math.hypot(*(high - m for m, (_, high) in zip(means, intervals, strict=True)))
    return mean - below / n, mean + above / n


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimate, without bias, the probability that one of k samples is right (Chen et al. 2021).

    Args:
        samples: samples that were drawn; `correct` of them are right.

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {correct} of them right, is not defined")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value of a paired difference (McNemar 1947).

    Args:
        only_first: problems that only the first side gets right; `only_second` likewise.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


def paired_difference_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the second accuracy minus the first on n problems, as fractions.

    Wald's interval with a pseudo-count of 1/2 for each kind of pair (Agresti and Min 2005), which
    holds for few differing pairs too.
    """
    a, b, total = only_first + 0.5, only_second + 0.5, n + 2
    difference = (b - a) / total
    spread = Z95 * math.sqrt((a + b) - (b - a) ** 2 / total) / total
    return max(-1.0, difference - spread), min(1.0, difference + spread)
