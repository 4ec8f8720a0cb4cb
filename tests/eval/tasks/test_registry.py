"""The registry holds every benchmark once, and groups expand to their benchmarks.

Needs the shared data for the benchmarks that it has whole; a second.
"""

from pathlib import Path

import pytest

from eval.tasks import BENCHMARKS, GROUPS, expand_groups
from eval.tasks.commonsense import CHOICES


def test_benchmarks_are_found_by_their_name() -> None:
    assert list(BENCHMARKS) == [
        *("gsm8k", "math", "math500", "humaneval", "mbpp", "mbpp_sanitized"),
        *CHOICES,
    ]
    assert all(benchmark.name == name for name, benchmark in BENCHMARKS.items())


def test_each_benchmark_is_graded_or_run() -> None:
    for benchmark in BENCHMARKS.values():
        assert (benchmark.grade is not None) is (benchmark.kind == "answer")
        assert (benchmark.finds_answer is not None) is (benchmark.kind == "answer")
        assert (benchmark.extract_program is not None) is (benchmark.kind == "code")


@pytest.mark.parametrize("name", ["gsm8k", "math500", "humaneval", "mbpp"])
def test_a_whole_file_has_the_official_number_of_problems(name: str, shared: Path) -> None:
    assert (
        len(BENCHMARKS[name].read_problems(shared / "data", None)) == BENCHMARKS[name].num_problems
    )


def test_groups_expand_and_name_each_benchmark_once() -> None:
    expanded = expand_groups(["commonsense", "gsm8k", "piqa"])
    assert expanded == [*GROUPS["commonsense"], "gsm8k"]
    assert len(GROUPS["commonsense"]) == 8
