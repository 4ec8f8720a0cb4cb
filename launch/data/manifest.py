"""Manifests of folders of tokens and of rows with labels: what they were made from, and what was left out."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from launch.config.loading import RENAMED_FIELDS
from launch.config.schema import Data
from launch.data.rows import BadRow, limit_identity
from launch.runtime.errors import UserError
from launch.runtime.locks import hold_lock

MANIFEST = "manifest.json"
# Reasons for which rows are left out or cut.
TOO_LONG, CUT = "no answer token within max_length", "answer cut at max_length"
NUM_NAMED = 3  # rows of each reason that the manifest names


def read_json(path: Path) -> dict:
    """Read a JSON file of a folder of tokens or rows. Raises UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete {path.parent} and prepare again"
        ) from None


def make_once(folder: Path, write: Callable[[], None]) -> None:
    """Have `write` fill `folder`, unless its manifest is there; of several processes one writes.

    Args:
        write: it writes the manifest last.
    """
    if (folder / MANIFEST).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / "lock"):
        # Another process may have made it meanwhile. NFS clients remember for a while that a file
        # was not there (lookupcache in nfs(5)), so the folder is listed.
        if MANIFEST not in os.listdir(folder):
            write()


def require_same_origin(folder: Path, manifest: dict, wanted: dict, option: str) -> None:
    """Raise UserError, naming the first difference, if `folder` was not made from `wanted`."""
    found = manifest["made_from"]
    for key in wanted:  # of a mix, one for each set of rows
        if key == "source" or key.startswith("source."):
            wanted = wanted | {key: limit_identity(wanted[key], found.get(key, {}))}
    for name, before, after in _list_differences(found, json.loads(json.dumps(wanted))):
        field = RENAMED_FIELDS.get(name, name)  # manifests hold old names
        values = f"{json.dumps(before)[:80]}, now {json.dumps(after)[:80]}"
        raise UserError(
            f"{option}: {folder} was made with another {field} ({values}); bring that back, "
            "or prepare into another folder"
        )


def _list_differences(found: dict, wanted: dict) -> Iterator[tuple[str, object, object]]:
    """Yield (name, found, wanted) of what differs.

    Keys that only `found` has do not count at the top: `wanted` may leave `source` out.
    """
    for key, now in wanted.items():
        before = found.get(key)
        if not (isinstance(before, dict) and isinstance(now, dict)):
            if before != now:
                yield key, before, now
            continue
        for name in dict.fromkeys([*now, *before]):
            if before.get(name) != now.get(name):
                yield f"{key}.{name}", before.get(name), now.get(name)


def check_refused_rows(
    manifest: dict, data: Data, cut: str = CUT, remedy: str | None = None
) -> None:
    """Raise UserError if there are rows that data.on_bad_row or data.on_cut says to refuse.

    The error names the first of them and the counts.

    Args:
        cut: the manifest's reason for rows that data.on_cut is about.
        remedy: what else than mending the rows helps; None: to set those two fields.
    """
    refused = dict(manifest["dropped"]) if data.on_bad_row == "refuse" else {}
    refused.pop(cut, None)
    if data.on_cut == "refuse" and manifest["cut"]:
        refused[cut] = manifest["cut"]
    if not refused:
        return
    named = [(*manifest["examples"][reason][0], reason) for reason in refused]
    row, what, reason = min(named)  # the lowest row number
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
    remedies = []
    if cut in refused:
        remedies.append("data.on_cut=keep or drop")
    if refused.keys() - {cut}:
        remedies.append("data.on_bad_row=drop")
    field = "data.max_length" if reason in (cut, TOO_LONG) else "data.path"
    raise UserError(
        f"{field}: row {row} of {data.path}: {what}; in all {counts}, of {manifest['selected']} "
        f"rows: mend them, or {remedy or 'set ' + ' and '.join(remedies)}"
    )


def count_dropped(tally: dict, bad: Iterable[BadRow]) -> None:
    """Count rows that are left out by their reason, and name the first few of each."""
    for row in bad:
        tally["dropped"][row.reason] = tally["dropped"].get(row.reason, 0) + 1
        name_row(tally, row)


def name_row(tally: dict, row: BadRow) -> None:
    """Note a row among the first few of its reason."""
    named = tally["examples"].setdefault(row.reason, [])
    if len(named) < NUM_NAMED:
        named.append([row.number, row.what])
