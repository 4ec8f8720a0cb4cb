"""What results.json has of a mix is said, and what of it may surprise. Needs nothing; a second."""

from launch.pages.tables import join_lines
from launch.run.results import DataRecord, describe_data

SOURCE = {"tokens_sha256": "0", "kept": 12, "cut": 0, "dropped": {}, "held_out": 0, "repeats": 1}
WHOLE = {"path": "a mix of code, chat", "tokens_sha256": "0", "rows": 38, "cut": 0, "dropped": {}}


def make_sources(**paths: str) -> dict[str, dict]:
    """Return what is taken of two sources."""
    chat = {"path": paths["chat"], "rows": 27, "available": 12, "dropped": {"empty": 3}}
    return {
        "code": SOURCE | {"path": paths["code"], "rows": 9, "available": 10, "held_out": 2},
        "chat": SOURCE | chat,
    }


def test_each_source_is_said_with_its_share() -> None:
    sources = make_sources(code="a.jsonl", chat="b.jsonl")
    code = "9 rows, 25.0% of an epoch, out of 10 in a.jsonl; 2 more held out"
    chat = "27 rows, 75.0% of an epoch, out of 12 in b.jsonl, each up to 3 times; 3 empty"
    said = [("data.sources.code", code), ("data.sources.chat", chat)]
    assert describe_data(DataRecord(**WHOLE, sources=sources)) == said
    assert join_lines(said) == dict(said)
    assert describe_data(DataRecord(**WHOLE)) == []


def test_what_may_surprise_is_said() -> None:
    sources = make_sources(code="a.jsonl", chat="a.jsonl")
    data = DataRecord(**WHOLE, sources=sources, scarce_sources=["code", "chat"], held_out_trained=1)
    subjects, lines = zip(*describe_data(data)[2:], strict=True)
    assert subjects == ("data.sources", "data.held_out", "data.held_out")
    assert lines[0] == (
        "the mix is as large as the rows of code and chat allow; raise data.sources.code.repeats and "
        "data.sources.chat.repeats for a larger one"
    )
    assert lines[1].startswith("1 of 2 held-out rows are trained on too")
    assert lines[2].startswith("code and chat read a.jsonl: a row that both read")
    rows = {"tokens_sha256": "0", "kept": 9, "cut": 0}
    dev = {"a": rows | {"trained": 2}, "b": rows | {"trained": 0}, "c": rows}
    copies = DataRecord(**WHOLE, dev=dev, held_out_calibrated=3)
    assert describe_data(copies) == [
        ("data.held_out", "3 held-out rows are among those of calibration.data too"),
        ("task.dev", "2 of 9 rows of a are trained on too (the same tokens)"),
    ]
    joined = join_lines(describe_data(data))
    assert joined["data.held_out"] == f"{lines[1]}; {lines[2]}"
