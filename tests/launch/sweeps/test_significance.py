"""Proves which rows of a table are said to differ: tests in pairs, and Holm's correction.

Needs nothing; takes 5 seconds.
"""

import math
from pathlib import Path

import pytest
from scipy import stats

from launch.runtime.files import write_json
from launch.sweeps.render import list_notes, render_markdown, render_tests_csv
from launch.sweeps.significance import (
    adjust_holm,
    compare_groups,
    compare_pairs,
    describe_power,
    find_best,
    pair_values,
)
from launch.sweeps.summary import collect_groups, list_columns
from tests.support.sweeps import make_held_out, make_results, make_sweep, write_results


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        # By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not be below the one before.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        # By hand, as R's p.adjust(method = "holm") documents its steps: 5, 4, 3, 2 and 1 times.
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holms_correction_on_worked_values(p_values: list[float], adjusted: list[float]) -> None:
    assert adjust_holm(p_values) == pytest.approx(adjusted)


def test_common_seeds_are_compared_in_pairs() -> None:
    first, second = {1: 50.0, 2: 60.0, 3: 70.0}, {3: 67.9, 1: 48.0, 2: 58.1}
    paired = pair_values(first, second | {4: 0.0})
    assert paired == ([50.0, 60.0, 70.0], [48.0, 58.1, 67.9])
    # By hand: differences 2, 1.9, 2.1, so t = 2 / (0.1 / sqrt(3)) with 2 degrees of freedom.
    p = 2 * stats.t.sf(2 / (0.1 / 3**0.5), 2)
    assert compare_pairs(*paired) == pytest.approx(p)
    assert p < 0.001
    assert stats.ttest_ind(*paired).pvalue > 0.5
    assert pair_values(first, {4: 48.0, 5: 58.1, 6: 67.9}) is None


def test_one_seed_or_no_difference_decides_nothing() -> None:
    assert pair_values({1: 90.0}, {1: 10.0}) is None
    assert pair_values({1: 5.0, 2: math.nan}, {1: 5.0, 2: 6.0}) is None
    assert compare_pairs([5.0, 6.0], [5.0, 6.0]) is None
    coarse_with_the_same_gap = [50.5, 60.5], [50.0, 60.0]
    same_but_for_rounding = [0.3, 0.8], [0.2, 0.7]
    assert compare_pairs(*coarse_with_the_same_gap) is None
    assert compare_pairs(*same_but_for_rounding) is None


def test_the_best_is_bold_only_after_correction(tmp_path: Path) -> None:
    """Alone p is 0.034 for a against b, of three tests 0.034 x 3 at least."""
    scores = {"a_1": [0.50, 0.52, 0.54], "b": [0.45, 0.48, 0.51], "c": [0.3, 0.45, 0.2]}
    sweep = make_sweep(tmp_path, scores)
    groups = collect_groups(sweep)
    column = list_columns(sweep, groups)[0]
    comparisons = compare_groups(groups, column, 3)
    assert [(c.first, c.second, c.num_pairs) for c in comparisons] == [
        (0, 1, 3),
        (0, 2, 3),
        (1, 2, 3),
    ]
    first = comparisons[0]
    assert first.difference.mean == pytest.approx(4)
    assert first.p == pytest.approx(stats.ttest_rel([50, 52, 54], [45, 48, 51]).pvalue)
    assert first.p < 0.05 < first.adjusted == pytest.approx(3 * first.p)
    assert find_best(groups, column, 3) is None
    assert find_best(groups[:2], column, 2) == 0  # of one test


def test_pairs_without_spread_remain_in_the_family(tmp_path: Path) -> None:
    """c is b with 10 points more on every seed, which no t-test can judge."""
    scores = {"a_1": [0.50, 0.52, 0.54], "b": [0.45, 0.48, 0.51], "c": [0.55, 0.58, 0.61]}
    sweep = make_sweep(tmp_path, scores)
    groups = collect_groups(sweep)
    comparisons = compare_groups(groups, list_columns(sweep, groups)[0], 3)
    assert [(c.first, c.second) for c in comparisons] == [(0, 1), (0, 2)]
    alone = stats.ttest_rel([50, 52, 54], [45, 48, 51]).pvalue
    # By hand: of three p values it is the second; without the pair of b and c it would be the last.
    assert (comparisons[0].p, comparisons[0].adjusted) == pytest.approx((alone, 2 * alone))


def test_pairs_that_have_not_been_run_are_in_the_family(tmp_path: Path) -> None:
    """Alone p is 0.034 for a against b, of three tests three times that, whether or not c has begun."""
    scores = {"a_1": [0.50, 0.52, 0.54], "b": [0.45, 0.48, 0.51], "c": [0.3, None, None]}
    sweep = make_sweep(tmp_path, scores)
    groups = collect_groups(sweep)
    alone = stats.ttest_rel([50, 52, 54], [45, 48, 51]).pvalue
    assert alone < 0.05 < 3 * alone
    for known in (groups, groups[:2]):  # also as long as c has no rate of its own
        shown = render_markdown(sweep, known)
        assert "**" not in shown
        assert "for the first of 3 corrected tests" in shown
        line = render_tests_csv(sweep, known).splitlines()[1].split(",")
        assert line[2:4] == ["a_1", "b"]
        assert list(map(float, line[-2:])) == pytest.approx([alone, 3 * alone])


def test_a_row_that_leads_only_by_other_seeds_is_not_best(tmp_path: Path) -> None:
    """Without its third seed b has the higher mean; on the seeds of both, a is above it each time."""
    sweep = make_sweep(
        tmp_path, {"a_1": [0.62, 0.63, 0.30], "b": [0.61, 0.6201, 0.3], "c": [None] * 3}
    )
    missing = sweep.list_eval_runs(sweep.list_cells()[1])["recipe"][2]
    (sweep.find_folder(missing) / "results.json").unlink()
    groups = collect_groups(sweep)
    column = list_columns(sweep, groups)[0]
    (comparison,) = compare_groups(groups, column, 3)
    assert comparison.adjusted < 0.05 and comparison.difference.mean > 0
    assert groups[1].estimate_column(column).mean > groups[0].estimate_column(column).mean
    assert find_best(groups, column, 3) is None


def test_a_row_with_a_diverged_seed_is_neither_best_nor_ahead(tmp_path: Path) -> None:
    scores = {"a_1": [0.2, 0.21, 0.2], "b": [0.8, 0.8105, 0.83], "c": [None] * 3}
    sweep = make_sweep(tmp_path, scores)
    column = list_columns(sweep, collect_groups(sweep))[0]
    assert find_best(collect_groups(sweep), column, 3) == 1
    first, second, _ = (sweep.list_eval_runs(cell)["recipe"] for cell in sweep.list_cells())
    folders = [sweep.find_folder(runs[2]) for runs in (first, second)]
    (folders[1] / "results.json").unlink()
    assert find_best(collect_groups(sweep), column, 3) == 1  # not run yet
    write_json(folders[1] / "state.json", {"state": "diverged"})
    groups = collect_groups(sweep)
    (comparison,) = compare_groups(groups, column, 3)
    assert comparison.adjusted < 0.05
    assert find_best(groups, column, 3) is None
    assert "**" not in render_markdown(sweep, groups)
    assert "A diverged seed is in no mean" in "\n".join(list_notes(sweep, groups))

    (folders[1] / "state.json").unlink()  # a diverged seed of the row that is behind hides nothing
    (folders[0] / "results.json").unlink()
    write_json(folders[0] / "state.json", {"state": "diverged"})
    groups = collect_groups(sweep)
    assert find_best(groups, column, 3) == 1
    assert "| held-out loss | a_1 - b | **" in render_markdown(sweep, groups)


def test_a_mean_that_is_not_finite_is_neither_best_nor_in_the_way(tmp_path: Path) -> None:
    scores = {"a_1": [0.2, 0.21, 0.2], "b": [0.8, 0.81, 0.83], "c": [0.5, 0.5, 0.52]}
    sweep = make_sweep(tmp_path, scores)
    for run in sweep.list_eval_runs(sweep.list_cells()[2])["recipe"]:
        write_results(sweep, run, make_results(0.5, held_out=make_held_out(math.nan)))
    groups = collect_groups(sweep)
    columns = {column.title: column for column in list_columns(sweep, groups)}
    orders = groups, groups[::-1], groups[1:]
    column = columns["held-out loss"]
    assert [find_best(order, column, 3) for order in orders] == [1, 1, None]


def test_what_few_pairs_can_show_is_said() -> None:
    text = describe_power(3, 10)
    # t(0.975, 2) = 4.303 and t(0.9975, 2) = 14.09, each over the root of 3; 2 / 2^3.
    assert "above 2.5 times its standard deviation" in text
    assert "above 8.1 times for the first of 10 corrected tests" in text
    assert "cannot go below p = 0.25" in text
