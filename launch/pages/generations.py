"""Pack responses with their grades for the page, where they are browsed and filtered.

A page holds a bounded amount of text, so that it stays quick on a phone. What is left out is said.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_CHARACTERS = 16_000_000  # of responses on a page
MAX_LENGTH = 8_000  # characters of a response; more are cut off
GRADES = ("strict", "literature")


class Packed(NamedTuple):
    """The responses of a page."""

    # sources, and problems: suite, id, question, reference, responses. A response is
    # [source, sample, output, strict, literature, remark]; a grade is null where there is none yet.
    data: dict[str, Any]
    count: int  # responses on the page
    notes: list[str]  # what is left out


def pack_responses(
    sources: Mapping[str, Sequence[dict]], further: Mapping[str, Sequence[dict]] | None = None
) -> Packed:
    """Pack the responses of several sources, problem by problem.

    Args:
        sources: name, such as that of a run -> rows of its generations.jsonl.
        further: other sources, which share what those leave of MAX_CHARACTERS.
    """
    problems: dict[tuple[str, str], list[dict[str, Any]]] = {}
    budgets = _share_out(sources, MAX_CHARACTERS)
    budgets |= _share_out(further or {}, MAX_CHARACTERS - sum(budgets.values()))
    sources = {**sources, **(further or {})}
    count, num_cut, left_out = 0, 0, {}
    for number, (source, rows) in enumerate(sources.items()):
        used = 0
        for place, row in enumerate(rows):
            output = str(row.get("output", ""))
            used += _count(row)
            if used > budgets[source]:
                left_out[source] = len(rows) - place
                break
            num_cut += len(output) > MAX_LENGTH
            problem = _find_problem(problems, row)
            problem["responses"].append(_pack_row(number, row, output))
            count += 1
    notes = [
        f"Left out: {number:,} responses of {source}, as a page holds {MAX_CHARACTERS:,} characters "
        "of responses; its generations.jsonl has all."
        for source, number in left_out.items()
    ]
    if num_cut:
        notes.append(
            f"Responses cut after {MAX_LENGTH:,} characters: {num_cut:,}; generations.jsonl has them "
            "whole."
        )
    entries = [entry for entries in problems.values() for entry in entries]
    return Packed({"sources": list(sources), "problems": entries}, count, notes)


def _count(row: dict) -> int:
    """Return the characters that a response takes on the page, those of its other fields counted."""
    return min(len(str(row.get("output", ""))), MAX_LENGTH) + 100


def _share_out(sources: Mapping[str, Sequence[dict]], left: int) -> dict[str, int]:
    """Share characters out: evenly, but what a small source leaves goes to the larger ones."""
    sizes = {name: sum(map(_count, rows)) for name, rows in sources.items()}
    budgets: dict[str, int] = {}
    ascending = sorted(sizes, key=sizes.get)
    for place, name in enumerate(ascending):
        budgets[name] = min(sizes[name], left // (len(ascending) - place))
        left -= budgets[name]
    return budgets


def _find_problem(
    problems: dict[tuple[str, str], list[dict[str, Any]]], row: dict
) -> dict[str, Any]:
    """Return the entry of a row's problem, which is made if it is new.

    Questions tell problems apart that share an id, as of two data folders. A response without
    grades has no question: it joins any problem of its id.
    """
    benchmark, name = str(row.get("suite", "")), str(row.get("id", ""))
    question, reference = row.get("question"), row.get("reference")
    entries = problems.setdefault((benchmark, name), [])
    for entry in entries:
        if question is None or entry["question"] in ("", str(question)):
            if not entry["question"]:
                entry["question"], entry["reference"] = _as_text(question), _as_text(reference)
            return entry
    texts = {"question": _as_text(question), "reference": _as_text(reference)}
    entries.append({"suite": benchmark, "id": name, **texts, "responses": []})
    return entries[-1]


def _as_text(value: object) -> str:
    return "" if value is None else str(value)


def _pack_row(source: int, row: dict, output: str) -> list[Any]:
    """Return a response as page.js reads it."""
    remark = str(row["reason"]) if row.get("reason") else ""
    if row.get("overlong"):
        remark = "the prompt is too long for the model"
    if len(output) > MAX_LENGTH:
        output = f"{output[:MAX_LENGTH]} …"
        remark = f"{remark} (cut after {MAX_LENGTH:,} characters)".strip()
    grades = [row.get(grader) for grader in GRADES]
    return [source, row.get("sample", 0), output, *grades, remark]
