"""The cross-check compares grades problem by problem, and refuses early what it cannot use.

lm-eval is replaced by a function here; nothing is needed. A few seconds.
"""

import json
from pathlib import Path

import pytest

from eval.crosscheck import harness
from launch.run.results import EvaluationResults, write_results
from launch.runtime.errors import UserError
from launch.scoring import crosscheck


def test_a_missing_harness_is_one_line_that_says_what_to_install() -> None:
    with pytest.raises(
        UserError, match=r"no_such_harness missing here: pip install .* requirements-crosscheck.txt"
    ):
        crosscheck.require_harnesses("json", "no_such_harness")


def test_responses_on_which_the_graders_differ_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def pass_all(folder: Path, tasks: list[str], *_: object) -> list[harness.Judgement]:
        (task,) = tasks
        documents = (folder / f"{task}.jsonl").read_text().splitlines()
        ids = [json.loads(document)["id"] for document in documents]
        return [harness.Judgement(task, "strict-match", problem, True, "") for problem in ids]

    monkeypatch.setattr(harness, "run_lm_eval", pass_all)
    monkeypatch.setattr(crosscheck, "require_harnesses", lambda *_: None)
    rows = [
        {"suite": "gsm8k", "id": "right", "output": "The answer is: 18", "reference": "18"},
        {"suite": "gsm8k", "id": "wrong", "output": "The answer is: 19", "reference": "18"},
        {"suite": "siqa", "id": "a", "output": "the answer is answer1", "reference": "answer1"},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    crosscheck.crosscheck_scores(source, None, None, "main", tmp_path / "checked")
    printed = capsys.readouterr().out
    assert "siqa: no other harness has a grader of these responses" in printed
    assert "| gsm8k | lm-eval strict-match | 50.0 | 50.0 | 100.0 | 2 | 1 |" in printed
    lines = (tmp_path / "checked" / "differences.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["wrong"]


def test_of_a_folder_only_the_rows_of_its_scores_are_compared(tmp_path: Path) -> None:
    def make_row(suite: str, number: int, **fields: object) -> dict:
        return {"suite": suite, "id": f"{suite}/{number}", "sample": 0, "output": "", **fields}

    grades = {"strict": True, "literature": True}
    rows = [
        make_row("gsm8k", 2, **grades),  # of an earlier command, beyond the limit
        make_row("math500", 0, **grades),  # that had another benchmark
        make_row("gsm8k", 0, **grades),
        make_row("gsm8k", 0, **grades | {"sample": 1}),
        make_row("gsm8k", 1, **grades),
        make_row("gsm8k", 3),  # of a later command that was killed
        make_row("siqa", 0),
    ]
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = {"accuracy": 1.0, "n": 2, "samples": 2, "correct": 2, "interval": (0, 1)}
    results = EvaluationResults(
        base={"name": "base", "weights_sha256": "0"},
        adapter=None,
        settings={},
        scores={"gsm8k": score | {"literature": score, "prompt": "recipe"}},
        conditions={"git_revision": None, "world_size": 1, "device": "cpu"},
    )
    write_results(tmp_path, results)
    selected, _ = crosscheck._read_source(tmp_path)
    assert [row["id"] for row in selected] == ["gsm8k/0", "gsm8k/1"]


def test_a_table_of_programs_alone_gets_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(crosscheck, "check_with_evalplus", lambda *_: [False])
    monkeypatch.setattr(crosscheck, "require_harnesses", lambda *_: None)
    (tmp_path / "mbpp.jsonl").write_text(
        json.dumps({"task_id": 11, "text": "", "code": "def f(): pass", "test_list": ["f()"]})
    )
    row = {"suite": "mbpp", "id": "mbpp/11", "output": "", "strict": True, "literature": True}
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(row) + "\n")
    folder = tmp_path / "not" / "there"
    crosscheck.crosscheck_scores(source, None, tmp_path, "main", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["crosscheck.md", "differences.jsonl"]


def test_sampled_responses_are_not_compared_with_greedy_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = EvaluationResults(
        base={"name": str(tmp_path), "weights_sha256": "0"},
        adapter=None,
        settings={"prompt": "recipe", "temperature": 0.7},
        scores={},
        conditions={"git_revision": None, "world_size": 1, "device": "cpu"},
    )
    assert crosscheck._compare_model({}, results, "main", tmp_path) == []
    assert "were drawn at a temperature" in capsys.readouterr().out


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a finished folder"):
        crosscheck.crosscheck_scores(tmp_path, None, None, "main", tmp_path / "checked")
    (tmp_path / "results.json").write_text('{"recipe": "metamath"}')
    with pytest.raises(UserError, match=r"--scores: .* is not the folder of a finished evaluation"):
        crosscheck.crosscheck_scores(tmp_path, None, None, "main", tmp_path / "checked")
