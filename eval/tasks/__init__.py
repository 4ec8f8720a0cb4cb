"""The benchmarks, by name.

To add one, write a file in this folder that defines `BENCHMARKS`, a sequence of
eval.tasks.base.Benchmark, and add its name to `BENCHMARK_FILES`.
"""

from collections.abc import Iterable
from importlib import import_module

from eval.tasks.base import Benchmark

BENCHMARK_FILES = (
    "gsm8k",
    "math",
    "humaneval",
    "mbpp",
    "commonsense",
)


def _load_benchmarks() -> dict[str, Benchmark]:
    benchmarks = {}
    for file in BENCHMARK_FILES:
        for benchmark in import_module(f"{__name__}.{file}").BENCHMARKS:
            benchmarks[benchmark.name] = benchmark
    return benchmarks


def _group_benchmarks(benchmarks: Iterable[Benchmark]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for benchmark in benchmarks:
        if benchmark.group is not None:
            groups[benchmark.group] = (*groups.get(benchmark.group, ()), benchmark.name)
    return groups


BENCHMARKS: dict[str, Benchmark] = _load_benchmarks()
GROUPS: dict[str, tuple[str, ...]] = _group_benchmarks(BENCHMARKS.values())
"""Name of a group -> names of its benchmarks."""


def expand_groups(names: Iterable[str]) -> list[str]:
    """Replace the name of each group by those of its benchmarks, and return each name once."""
    expanded: dict[str, None] = {}
    for name in names:
        expanded |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(expanded)
