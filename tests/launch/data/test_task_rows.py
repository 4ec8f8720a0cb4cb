"""Rows with labels: labels are checked, pairs are truncated, and padding is in no sum.

Needs nothing. Takes 5 s.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from astra.calibrate import sum_second_moments
from astra.moments import Batch, find_groups
from astra.targets import find_targets
from astra.windows import make_plan
from launch.config.schema import Data
from launch.config.task import Task
from launch.data.batches import collate_rows
from launch.data.manifest import check_refused_rows
from launch.data.task_rows import TRUNCATED, RowFolder, obtain_rows, read_base
from launch.engines.base import load_pretrained
from launch.models.check import check_model
from launch.models.head import Head
from launch.runtime.errors import UserError
from launch.training.row_loss import RowLoss
from tests.support.classifiers import LABELS, MAX_LENGTH, TARGETS, make_base, make_rows, write_rows

PAIRS = {"kind": "classification", "labels": LABELS, "sentence1": "left", "sentence2": "right"}


def obtain(
    folder: Path, rows: list[dict], task: dict, kind: str = "bert", **data: object
) -> RowFolder:
    """Return the rows' folder, of a base of `kind`."""
    base = folder / kind
    if not base.is_dir():
        make_base(base, kind)
    path = write_rows(folder / f"rows{len(list(folder.glob('rows*')))}.jsonl", rows)
    settings = Data(path=str(path), max_length=MAX_LENGTH, **data)
    task = Task(**task)
    found = obtain_rows(settings, task, read_base(task, base))
    check_refused_rows(found.manifest, settings, cut=TRUNCATED)
    return found


@pytest.mark.parametrize("kind", TARGETS)
def test_tokens_are_those_of_the_tokenizer(kind: str, tmp_path: Path) -> None:
    rows = make_rows(30, 3)
    rows[0] |= {"left": "w1 " * 2 * MAX_LENGTH, "right": ""}
    folder = obtain(tmp_path, rows, PAIRS, kind)
    tokens = folder.open_tokens()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
    num_longer = 0
    for i, row in enumerate(rows):
        whole = tokenizer(row["left"], row["right"])
        num_longer += len(whole.input_ids) > MAX_LENGTH
        # A batch, as an empty second text is otherwise left out with its special tokens.
        (cut,) = tokenizer(
            [row["left"]], [row["right"]], truncation="longest_first", max_length=MAX_LENGTH
        ).encodings
        span = slice(tokens.offsets[i], tokens.offsets[i + 1])
        assert tokens.tokens[span].tolist() == cut.ids
        if kind in ("bert", "deberta"):
            assert tokens.token_types[span].tolist() == cut.type_ids
        else:
            assert tokens.token_types is None
    assert tokens.labels.tolist() == [LABELS.index(row["label"]) for row in rows]
    assert 0 < num_longer == tokens.num_truncated == folder.manifest["cut"] < 30
    with pytest.raises(UserError, match=r"data\.max_length: row \d+ .* truncated to 16"):
        obtain(tmp_path, rows, PAIRS, kind, on_cut="refuse")
    kept = obtain(tmp_path, rows, PAIRS, kind, on_cut="drop").manifest
    assert kept["kept"] == 30 - num_longer and kept["cut"] == 0


def test_labels_are_texts_or_places_or_numbers(tmp_path: Path) -> None:
    def read(labels: list, task: dict) -> list[float]:
        rows = [{"left": "w1 w2", "right": "", "label": label} for label in labels]
        found = obtain(tmp_path, rows, task)
        return found.open_tokens().labels.tolist()

    assert read(["yes", 0, 2.0, "1"], PAIRS) == [2, 0, 2, 1]
    assert read(["5", 3, 4.0], PAIRS | {"labels": ["3", "4", "5"]}) == [2, 0, 1]
    assert read([1.0, 2, "3"], PAIRS | {"labels": ["1.0", "2.0", "3.0"]}) == [0, 1, 2]
    assert read([2.0, 0.5], PAIRS | {"labels": ["0.5", "1.0", "1.5", "2.0"]}) == [3, 0]
    numbers = {"kind": "regression", "sentence1": "left", "sentence2": "right"}
    assert read([1, 2.5, " 3.25 "], numbers) == [1, 2.5, 3.25]
    refused = {
        json.dumps(PAIRS): ["Yes", 3, -1, 0.5, True, None, ""],
        json.dumps(PAIRS | {"labels": ["1", "2"]}): [0, "no"],
        json.dumps(numbers): ["high", None, True, "nan", "inf"],
    }
    for task, labels in refused.items():
        for label in labels:
            with pytest.raises(UserError, match=r"^data\.path: (row 2 of|nothing)[^\n]*label"):
                read([1, label], json.loads(task))


@pytest.mark.parametrize("kind", TARGETS)
def test_micro_batch_and_padding_change_neither_loss_nor_moments(kind: str, tmp_path: Path) -> None:
    tokens = obtain(tmp_path, make_rows(9, 4), PAIRS, kind).open_tokens()
    head = Head(tuple(LABELS), tokens.pad_token)
    model = load_pretrained(check_model(tmp_path / kind, head=head), torch.float32).eval()
    linears = find_targets(model, ["all-linear"])

    def measure(size: int, padding: int) -> tuple[float, list[torch.Tensor]]:
        loss, batches = 0.0, []
        for start in range(0, 9, size):
            examples = [*range(start, min(start + size, 9)), None]
            rows = collate_rows(tokens, examples)
            extra = (0, padding)
            pad = torch.nn.functional.pad
            types = None if rows.token_type_ids is None else pad(rows.token_type_ids, extra)
            rows = type(rows)(
                pad(rows.input_ids, extra, value=tokens.pad_token),
                pad(rows.attention_mask, extra),
                types,
                rows.labels,
                rows.weights,
            )
            with torch.no_grad():
                loss += RowLoss(model)(*rows.arguments()).item()
            mask = rows.attention_mask.bool() & rows.weights.bool()[:, None]
            batches.append(Batch(**rows.inputs(), token_mask=mask, row_labels=rows.labels))
        groups = find_groups(model, linears, batches[0])
        plan = make_plan(model, linears, groups, tokens=9 * 20)
        moments = sum_second_moments(model, linears, batches, plan.windows[0], plan, [None] * 9)
        assert {int(moment.count) for moment in moments} == {len(tokens.tokens)}
        return loss, [moment.second_moment() for moment in moments]

    loss, moments = measure(1, 0)
    for size, padding in ((4, 0), (9, 4)):
        other, others = measure(size, padding)
        assert other == pytest.approx(loss, rel=1e-5)
        for found, wanted in zip(others, moments, strict=True):
            atol = 1e-5 * wanted.abs().max().item()
            torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
