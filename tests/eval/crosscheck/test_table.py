"""The table of our verdicts beside another harness's. Needs nothing."""

from eval.crosscheck.table import Comparison, find_differences, render_comparisons


def test_table_counts_the_problems_that_differ() -> None:
    ours = {
        name: {"id": name, "reference": "1", "output": name, "strict": strict, "literature": False}
        for name, strict in (("a", True), ("b", True), ("c", False), ("d", False))
    }
    verdicts = Comparison("gsm8k", "lm-eval strict-match", {"a": True, "b": False, "c": True})
    texts = Comparison(
        "gsm8k", "lm-eval's own responses", {"a": True, "d": False}, True, {"a": "a", "d": "e"}
    )
    assert [row["id"] for row in find_differences(verdicts, ours)] == ["b", "c"]
    assert [
        (row["id"], row["output"], row["their_output"]) for row in find_differences(texts, ours)
    ] == [("d", "d", "e")]
    lines = render_comparisons([verdicts, texts], {"gsm8k": ours}).splitlines()
    assert lines[2:] == [
        "| gsm8k | lm-eval strict-match | 66.7 | 0.0 | 66.7 | 3 | 2 |",
        "| gsm8k | lm-eval's own responses | 50.0 | 0.0 | 1 same texts | 2 | 1 |",
    ]
