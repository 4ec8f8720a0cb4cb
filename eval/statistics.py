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
    return (centre - spread) / scale if correct else 0.0, (centre + spread) / scale if correct < n else 1.0
