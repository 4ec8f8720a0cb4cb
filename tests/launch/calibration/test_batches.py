"""Which examples a calibration takes: of a mix distinct ones, of the whole file in both halves.

The reference statistics, which take rows that are too long too, take none that are held out. Needs nothing; 2 s.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.calibration.batches import check_reference_rows, draw_samples, split_samples
from launch.calibration.effective_rank import limit_samples
from launch.calibration.run import describe_calibration
from launch.config.loading import validate_recipe
from launch.config.schema import Recipe
from launch.data.manifest import TOO_LONG
from launch.data.mix.shares import choose_examples
from launch.data.rows import EMPTY
from launch.runtime.errors import UserError
from launch.runtime.files import hash_file

SOURCES = {"b": {"rows": 90, "available": 30, "held_out": 0}}
SOURCES = {"a": {"rows": 30, "available": 40, "held_out": 2}} | SOURCES


def make_recipe(samples: int, is_mix: bool = True) -> Recipe:
    """Return a recipe that calibrates on so many examples, of a mix or of one set."""
    mix = {"a": {"path": "a.jsonl", "count": 30}}
    mix["b"] = {"path": "b.jsonl", "count": 90, "repeats": 3}
    data = {"sources": mix} if is_mix else {"path": "a.jsonl"}
    calibration = {"samples": samples, "split_half": True}
    return validate_recipe({"model": {"name": "m"}, "data": data, "calibration": calibration})


MIX = SimpleNamespace(  # inputs
    calibration=SimpleNamespace(tokens=range(120)), data={"sources": SOURCES, "dropped": {}}
)


def draw(recipe: Recipe) -> list[int]:
    """Draw the samples of a recipe on a mix of SOURCES."""
    return draw_samples(recipe, MIX)


def test_samples_of_a_mix_are_distinct_rows() -> None:
    rows = [("a", i) for i in choose_examples("a", 40, 30).tolist()]
    rows += [("b", i) for i in choose_examples("b", 30, 90).tolist()]
    samples = draw(make_recipe(60))
    assert {rows[i] for i in samples} == set(rows) and len(samples) == len(set(rows)) == 60
    with pytest.raises(UserError, match=r"^calibration.samples: 61 is above the 60 examples"):
        draw(make_recipe(61))


def test_no_more_of_a_mix_is_measured_than_its_distinct_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = []
    monkeypatch.setattr("launch.calibration.effective_rank.print_rank0", printed.append)
    assert limit_samples(make_recipe(60), MIX).calibration.samples == 60 and not printed
    limited = limit_samples(make_recipe(61), MIX)
    assert len(draw(limited)) == 60 and len(printed) == 1


def test_both_halves_have_every_source() -> None:
    samples = draw(make_recipe(40))
    halves = split_samples(samples)
    assert sorted(halves[0] + halves[1]) == samples and len(halves[0]) == len(halves[1])
    of_a = [sum(i < 30 for i in half) for half in halves]
    assert abs(of_a[0] - of_a[1]) <= 1 and min(of_a) > 5
    # Rows in an order, such as from easy to hard, are in both halves alike.
    assert split_samples([1, 4, 6, 8, 9]) == [[1, 6, 9], [4, 8]]


def test_a_calibration_of_another_split_is_not_resumed() -> None:
    inputs = SimpleNamespace(
        calibration=SimpleNamespace(tokens=range(9), data={}), data={}, base={}, dtype=torch.float32
    )
    described = describe_calibration(make_recipe(5, is_mix=False), inputs, conditions={})
    assert described["split_half"] == "interleaved"  # earlier ones, of first and last rows: True


@pytest.mark.parametrize("num_held_out", [0, 2])
def test_the_reference_takes_rows_that_are_too_long_but_none_that_are_held_out(
    num_held_out: int,
) -> None:
    is_dropped = [False, True, False, False, False, False, True, False, True]
    kept = [row for row in range(9) if not is_dropped[row]]
    training, held_out = kept[: 6 - num_held_out], kept[6 - num_held_out :]
    dropped = {TOO_LONG: 3, EMPTY: 5}  # empty rows are not among the 9
    inputs = SimpleNamespace(
        calibration=SimpleNamespace(tokens=training), data={"dropped": dropped}
    )
    num_samples = 4 if num_held_out else 9

    def draw_reference(num_samples: int) -> list[int]:
        data = {"path": "a.jsonl", "held_out": num_held_out}
        calibration = {"samples": num_samples, "statistics": "reference"}
        values = {"model": {"name": "m"}, "data": data, "calibration": calibration}
        return draw_samples(validate_recipe(values), inputs)

    samples = draw_reference(num_samples)
    assert len(samples) == num_samples and not set(samples) & set(held_out)
    if not num_held_out:
        assert samples == list(range(9))
    with pytest.raises(UserError, match=rf"above the {num_samples} examples"):
        draw_reference(num_samples + 1)


def test_the_reference_reads_no_other_rows_than_prepared_tokens_were_made_from(
    tmp_path: Path,
) -> None:
    rows, prepared, folder = (tmp_path / name for name in ("a.jsonl", "prepared", "calibration"))
    row = {"query": "q", "response": "a"}
    rows.write_text(json.dumps(row) + "\n")
    prepared.mkdir()
    manifest = {"source_sha256": {"a.jsonl": hash_file(rows)}}
    (prepared / "manifest.json").write_text(json.dumps(manifest))

    def check(statistics: str = "reference", path: str | None = None) -> None:
        values = {
            "model": {"name": "m"},
            "data": {"path": str(rows), "prepared": str(prepared)},
            "calibration": {"statistics": statistics, "path": path},
        }
        check_reference_rows(validate_recipe(values), folder)

    check()
    rows.write_text(json.dumps(row | {"response": "b"}) + "\n")
    with pytest.raises(
        UserError, match=r"^calibration\.statistics: .* are not those that .*prepared"
    ):
        check()
    rows.unlink()
    with pytest.raises(
        UserError, match=r"^calibration\.statistics: .* data\.path: no file or folder"
    ):
        check()
    # Nothing is read again.
    check("exact")
    check(path="elsewhere")
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    check()
