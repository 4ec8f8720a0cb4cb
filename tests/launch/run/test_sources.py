"""What results.json has of a mix is said in a line for each source. Needs nothing; a second."""

from launch.pages.tables import _list_sources
from launch.run.results import Data, describe_sources

SOURCE = {"tokens_sha256": "0", "kept": 12, "cut": 0, "dropped": {}, "held_out": 0, "repeats": 1}


def test_each_source_is_said_with_its_share() -> None:
    sources = {
        "code": SOURCE | {"path": "a.jsonl", "rows": 9, "available": 10, "held_out": 2},
        "chat": SOURCE | {"path": "b.jsonl", "rows": 27, "available": 12, "dropped": {"empty": 3}},
    }
    whole = {"path": "a mix of code, chat", "tokens_sha256": "0", "rows": 38, "cut": 0}
    data = Data(**whole, dropped={}, sources=sources, held_out_trained=1)
    code = "9 rows, 25.0% of an epoch, out of 10 in a.jsonl; 2 more held out"
    chat = "27 rows, 75.0% of an epoch, out of 12 in b.jsonl, each up to 3 times; 3 empty"
    assert describe_sources(data) == [f"code: {code}", f"chat: {chat}"]
    assert _list_sources(data) == {
        "data.sources.code": code,
        "data.sources.chat": chat,
        "held-out rows that are trained on too": 1,
    }
    assert describe_sources(Data(**whole, dropped={})) == []
