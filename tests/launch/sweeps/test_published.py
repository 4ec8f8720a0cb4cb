"""Proves beside which rows a published score is shown, and what is said of the others.

Needs nothing; takes 5 seconds.
"""

from pathlib import Path

import pytest
import yaml

from launch.methods.registry import METHODS
from launch.sweeps.published import (
    FIELDS,
    METHOD_FIELDS,
    PUBLISHED,
    describe_hidden,
    find_published,
    list_shown,
)
from launch.sweeps.summary import collect_groups
from launch.sweeps.table import TABLES, read_table
from tests.support.sweeps import TABLE

ROWS = {
    "lora": {"set": {"adapter.method": "lora"}},
    "kpm": {"set": {"adapter.method": "corda", "adapter.corda_mode": "kpm"}},
    "kpm, nq_open": {
        "set": {
            "adapter.method": "corda",
            "adapter.corda_mode": "kpm",
            "calibration.data": "nq_open",
        }
    },
    "ipm": {"set": {"adapter.method": "corda"}},
}


def find_scores(
    folder: Path, *overrides: str, benchmarks: tuple[str, ...] = ("gsm8k", "math"), **fields: object
) -> tuple[dict[str, list[dict[str, float]]], list[str]]:
    """Return the scores shown beside each row of a table, and what is said of the others."""
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump(TABLE | {"rows": ROWS} | fields))
    groups = collect_groups(read_table(str(path), overrides, folder / "runs"))
    found = find_published(groups, benchmarks)
    shown = {}
    for group, entries in zip(groups, found, strict=True):
        shown[group.label] = [entry.scores for entry in list_shown(entries)]
    return shown, describe_hidden(found)


def test_scores_of_the_same_protocol_are_shown_with_values_in_conflict(tmp_path: Path) -> None:
    shown, hidden = find_scores(tmp_path)
    assert shown["lora"] == [
        {"gsm8k": 42.68, "math": 5.88},
        {"gsm8k": 42.30},
        {"gsm8k": 42.68, "math": 5.92},
    ]
    assert shown["ipm"] == [{"gsm8k": 53.45, "math": 8.64}, {"gsm8k": 54.59, "math": 8.54}]
    assert shown["kpm, nq_open"] == [{"gsm8k": 46.32, "math": 7.00}, {"gsm8k": 45.64, "math": 6.94}]
    assert shown["kpm"] == []  # on the training rows: another protocol
    assert (
        "MiLoRA, table 2 (lora): rows 395000, here 100000, lr 0.0003, here 2e-05, epochs 3, here 1, "
        "rank 64, here 128"
    ) in hidden


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.lr=1e-4", "lr 2e-05, here 0.0001"),
        ("train.epochs=2", "epochs 1, here 2"),
        ("train.max_steps=9", "epochs 1, here 9 steps"),
        ("adapter.rank=64", "rank 128, here 64"),
        ("data.limit=5000", "rows 100000, here 5000"),
        ("data.held_out=500", "rows 100000, here 99500"),
        ("data.path=other/rows", "data MetaMathQA, here other/rows"),
    ],
)
def test_another_protocol_is_not_shown_and_the_difference_is_named(
    override: str, reason: str, tmp_path: Path
) -> None:
    shown, hidden = find_scores(tmp_path, override)
    assert not any(shown.values())
    peft = [line for line in hidden if line.startswith("PEFT, ")]
    assert any(reason in line for line in peft)


def test_lora_with_a_rate_ratio_is_compared_with_lora_plus(tmp_path: Path) -> None:
    rows = {"lora+": {"set": {"adapter.method": "lora", "train.lr_ratio": 16}}}
    shown, hidden = find_scores(tmp_path, rows=rows)
    assert shown["lora+"] == []
    [line] = hidden
    assert line.startswith("MiLoRA, table 5 (")
    assert "lora lr_ratio 16" in line and line.endswith("lr_ratio not stated")


def test_another_base_has_its_own_scores_and_corda_on_8b_is_kpm(tmp_path: Path) -> None:
    shown, _ = find_scores(tmp_path, "model.name=/models/Meta-Llama-3-8B")
    assert shown["kpm, nq_open"] == [{"gsm8k": 74.68, "math": 25.34}]
    assert shown["lora"] == [{"gsm8k": 72.33, "math": 24.04}]
    assert shown["ipm"] == []
    shown, hidden = find_scores(tmp_path, "model.name=other/base")
    assert not any(shown.values())
    assert hidden == []


def test_every_published_score_has_its_whole_protocol_and_its_source() -> None:
    entries = yaml.safe_load((TABLES / PUBLISHED).read_text())
    labels = {*METHODS, "corda ipm", "corda kpm", "lora+"}
    for entry in entries:
        assert entry["source"]
        assert entry["protocol"].keys() == {"model", *FIELDS} - {*METHOD_FIELDS}
        for method, scores in entry["scores"].items():
            assert method in labels
            assert {*METHOD_FIELDS, "gsm8k", "math", "humaneval", "commonsense"} >= scores.keys()
            if method.startswith("corda"):
                assert scores["calibration"] == ("own" if method == "corda ipm" else "nq_open")
    assert sum(len(entry["scores"]) for entry in entries) == 39
