"""Stored responses are graded again: samples stay samples of their problem.

Needs nothing. A second.
"""

import json
from pathlib import Path

import pytest

from launch.run.results import Score
from launch.runtime.errors import UserError
from launch.scoring.regrade import GRADED, regrade_responses


def make_rows(answers: dict[str, list[str]]) -> list[dict]:
    """Make rows of gsm8k: the answers to each problem, whose reference is 1."""
    rows = []
    for problem, of_problem in answers.items():
        for sample, answer in enumerate(of_problem):
            row = {"suite": "gsm8k", "id": problem, "sample": sample, "reference": "1"}
            rows.append(row | {"output": f"The answer is: {answer}"})
    return rows


def regrade(rows: list[dict], folder: Path) -> Score:
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return regrade_responses(path, folder / "again", None, 10, False)["gsm8k"]


def test_samples_of_a_problem_are_not_problems(tmp_path: Path) -> None:
    rows = make_rows({"a": ["1", "2"], "b": ["2", "1"], "c": ["1", "1"], "d": ["2", "2"]})
    for order in (rows, rows[::-1]):
        score = regrade(order, tmp_path)
        assert (score.n, score.samples, score.accuracy, score.correct) == (4, 2, 0.5, 2)
        assert score.pass_at == {"1": 0.5} and score.literature.pass_at == {"1": 0.5}
        assert score.interval[0] < 0.5 < score.interval[1]
    graded = (tmp_path / "again" / GRADED).read_text().splitlines()
    assert [json.loads(line)["sample"] for line in graded] == [row["sample"] for row in rows[::-1]]


def test_rows_without_an_id_are_problems_of_their_own(tmp_path: Path) -> None:
    rows = [{"suite": "gsm8k", "output": "The answer is: 1", "reference": "1"}] * 3
    score = regrade(rows, tmp_path)
    assert (score.n, score.samples, score.pass_at) == (3, 1, None)


def test_an_unfinished_file_counts_each_problem_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    score = regrade(make_rows({"a": ["1", "1", "2", "2"], "b": ["1"]}), tmp_path)
    assert (score.n, score.accuracy, score.pass_at) == (2, 0.75, None)
    assert "have 1 to 4 responses" in capsys.readouterr().out


def test_a_doubled_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has sample 0 of a of gsm8k twice"):
        regrade(make_rows({"a": ["1"], "b": ["1"]}) * 2, tmp_path)


def test_prompts_that_were_too_long_are_still_named(tmp_path: Path) -> None:
    rows = make_rows({"a": ["1"], "b": [""]})
    rows[1] |= {"output": "", "overlong": True}
    assert regrade(rows, tmp_path).overlong == ["b"]


def test_responses_that_were_cut_off_are_still_counted(tmp_path: Path) -> None:
    rows = make_rows({"a": ["1"], "b": ["1"]})
    assert "truncated" not in regrade(rows, tmp_path).model_fields_set
    rows[1]["truncated"] = True
    assert regrade(rows, tmp_path).truncated == 1


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        regrade_responses(path, tmp_path, None, 10, False)
