"""Choose a row's learning rate: rates of four a decade, extended until the best one is interior.

A grid may take each of the four, or every second one and so on, and is extended at its own spacing.
A rate is known by its step k: the rate is 10^(k / 4), rounded to three significant digits, so that
the names of the runs never change. A run that diverged has an infinite loss: it is worse than any
other, and its rate is an end of the curve like any other.
"""

import math
from collections.abc import Mapping, Sequence

STEPS_PER_DECADE = 4
# Steps beyond which no grid is extended: 1e-6 and 3.16e-2.
LOWEST_STEP, HIGHEST_STEP = -24, -6
# Relative. The neighbours of a step are a factor of 1.78 away, three digits round by up to 0.5 %.
TOLERANCE = 0.01


def make_rate(step: int) -> float:
    """Return the learning rate of a step."""
    return float(f"{10 ** (step / STEPS_PER_DECADE):.3g}")


def find_step(rate: float) -> int | None:
    """Return the step whose rate is `rate`, but for rounding; None if it is between two steps."""
    step = round(STEPS_PER_DECADE * math.log10(rate))
    return step if math.isclose(rate, make_rate(step), rel_tol=TOLERANCE) else None


def make_grid(rates: Sequence[float], factor: float) -> list[float]:
    """Return the rates times `factor`, each as its step has it.

    Raises:
        ValueError: a product is no step or is beyond the ends, or they are not in ascending order and
            evenly spaced.
    """
    steps: list[int] = []
    for rate in rates:
        step = find_step(rate * factor)
        times = "" if factor == 1 else f" times rate_factor {factor:g}"
        if step is None:
            near = make_rate(round(STEPS_PER_DECADE * math.log10(rate * factor)))
            raise ValueError(
                f"{rate:g}{times} is not one of the four rates a decade that extend needs; the "
                f"nearest is {near:g}"
            )
        if not LOWEST_STEP <= step <= HIGHEST_STEP:
            raise ValueError(
                f"{rate:g}{times} is not within {make_rate(LOWEST_STEP):g} to "
                f"{make_rate(HIGHEST_STEP):g}, where a grid may be extended; leave it out"
            )
        steps.append(step)
        if len(steps) > 1 and step - steps[-2] != max(1, steps[1] - steps[0]):
            raise ValueError(
                f"{rate:g} does not follow on the rate before it at the grid's spacing; give evenly "
                "spaced rates in ascending order"
            )
    return [make_rate(step) for step in steps]


def find_spacing(rates: Sequence[float]) -> int:
    """Return by how many steps the rates of a grid are apart, in ascending order; 1 for a single one."""
    return round(STEPS_PER_DECADE * math.log10(rates[1] / rates[0])) if len(rates) > 1 else 1


def choose_next_rate(losses: Mapping[float, float]) -> float | None:
    """Return the rate by which a finished grid is to be extended, at its own spacing.

    Args:
        losses: held-out loss of each rate so far; infinite for a run that diverged.

    Returns:
        The next rate beyond the end at which the best is. None if the best is interior, or its end
        is the last rate allowed. Where all have diverged the lowest counts as the best.
    """
    rates = sorted(losses)
    best, spacing = find_best_rate(losses), find_spacing(rates)
    lower, higher = find_step(rates[0]) - spacing, find_step(rates[-1]) + spacing
    if best in (None, rates[0]) and lower >= LOWEST_STEP:
        return make_rate(lower)
    if best == rates[-1] and higher <= HIGHEST_STEP:
        return make_rate(higher)
    return None


def find_best_rate(losses: Mapping[float, float | None]) -> float | None:
    """Return the rate of the least loss, the lowest of equal ones.

    Returns:
        None if a loss is None, that is not known yet, or none is finite.
    """
    if None in losses.values():
        return None
    finite = {rate: losses[rate] for rate in sorted(losses) if math.isfinite(losses[rate])}
    return min(finite, key=finite.get, default=None)


def have_all_diverged(losses: Mapping[float, float | None]) -> bool:
    """Return whether every rate has been run, and none has a finite loss. None is not run yet."""
    return None not in losses.values() and find_best_rate(losses) is None


def find_neighbours(rates: Sequence[float], rate: float) -> tuple[float | None, float | None]:
    """Return the next lower and the next higher of `rates`; None at an end."""
    lower = [other for other in rates if other < rate]
    higher = [other for other in rates if other > rate]
    return max(lower, default=None), min(higher, default=None)
