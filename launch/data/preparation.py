"""Prepare a folder of tokens that runs take as data.prepared, and report what it holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.config.rows import MixedRows
from launch.config.schema import CALIBRATION_TOKENS, Data, Recipe
from launch.data.calibration_tokens import (
    CALIBRATION_NAMES,
    obtain_calibration_rows,
    prepare_calibration_tokens,
)
from launch.data.inputs import describe_mixed_tokens
from launch.data.manifest import check_refused_rows
from launch.data.mix.tokens import cache_sources, check_refused_sources, make_mix
from launch.data.overlap import find_overlaps
from launch.data.rows import fetch_source, rename_notes
from launch.data.task_rows import RowFolder, check_all_rows, obtain_all_rows, read_base
from launch.data.token_cache import SPECIAL, TokenFolder, make_tokens
from launch.models.check import (
    check_max_length,
    check_token_ids,
    get_num_embeddings,
    read_config,
)
from launch.models.files import fetch_model, load_tokenizer
from launch.run import results
from launch.runtime.errors import UserError
from launch.runtime.files import write_json, write_text

OVERLAP, REPORT = "overlap.json", "report.md"
NUM_FILES = 10  # that the report names


def prepare_tokens(recipe: Recipe, folder: Path, benchmarks: Sequence[str]) -> None:
    """Make the tokens of a recipe in `folder`, and write and print the report.

    Started again, it resumes; a finished folder is checked byte by byte.

    Args:
        benchmarks: benchmarks and groups with which the rows are compared. What earlier starts
            found of other benchmarks stays in the report.

    Raises:
        UserError: the rows cannot be read, or the recipe refuses some of them; or the folder holds
            something else.
        EvalError: a benchmark cannot be read.
    """
    model_path = fetch_model(recipe.model.name, recipe.model.revision, weights=False)
    config = read_config(model_path)
    check_max_length(recipe.data.max_length, config, recipe.model.name)
    if recipe.task.has_head:
        if benchmarks:
            raise UserError(
                "--check-overlap: compares instructions with benchmarks, and the rows of a "
                f"{recipe.task.kind} have none; leave it out"
            )
        _prepare_rows(recipe, folder, model_path)
        return
    data = recipe.data
    if data.sources:
        prepared = make_mix(folder, data, model_path, cache_sources(data, model_path), verify=True)
    else:
        prepared = make_tokens(folder, data, model_path, fetch_source(data), verify=True)
    largest = int(prepared.open_tokens().tokens.max())
    check_token_ids(largest, get_num_embeddings(config), load_tokenizer(model_path))
    manifest = prepared.manifest
    path = folder / OVERLAP
    overlaps = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if benchmarks:
        overlaps |= find_overlaps(recipe, benchmarks)
        write_json(path, overlaps)
    if data.sources:
        report = render_mix_report(data, recipe.model.name, prepared, overlaps)
    else:
        report = render_report(data, recipe.model.name, manifest, overlaps)
    write_text(folder / REPORT, report)
    print(report, flush=True)
    # Last: the report says which rows those are.
    if data.sources:
        check_refused_sources(manifest["parts"], data)
    else:
        check_refused_rows(manifest, data)
    if recipe.calibration_source is not None:
        _prepare_calibration(recipe, folder / CALIBRATION_TOKENS, model_path)


def _prepare_rows(recipe: Recipe, folder: Path, model_path: Path) -> None:
    """Make the rows with labels of a recipe in `folder`, and write and print the report.

    Raises what `prepare_tokens` does.
    """
    base = read_base(recipe.task, model_path)
    rows, dev = obtain_all_rows(recipe, base, folder)
    num_embeddings = get_num_embeddings(base.config)
    parts = [("", rows), *((f"\nDevelopment rows of {name}:\n\n", dev[name]) for name in dev)]
    if recipe.calibration_source is not None:
        calibration = obtain_calibration_rows(recipe, model_path, folder / CALIBRATION_TOKENS)
        manifest = rename_notes(calibration.manifest, *CALIBRATION_NAMES)
        calibration = calibration._replace(manifest=manifest)
        parts.append(("\nTo calibrate on:\n\n", calibration))
    report = ""
    for title, found in parts:
        largest = int(found.open_tokens().tokens.max())
        check_token_ids(largest, num_embeddings, base.tokenizer)
        report += title + render_row_report(recipe, found)
    write_text(folder / REPORT, report)
    print(report, flush=True)
    check_all_rows(recipe, rows, dev)  # last: the report says which rows those are


def _prepare_calibration(recipe: Recipe, folder: Path, model_path: Path) -> None:
    """Make the tokens of calibration.data in `folder`, and write and print their report.

    Raises what `prepare_tokens` does.
    """
    data = recipe.calibration_source
    prepared = prepare_calibration_tokens(folder, data, model_path)
    largest = int(prepared.open_tokens().tokens.max())
    config = read_config(model_path)
    check_token_ids(largest, get_num_embeddings(config), load_tokenizer(model_path))
    manifest = rename_notes(prepared.manifest, *CALIBRATION_NAMES)
    report = render_report(data, recipe.model.name, manifest, {})
    write_text(folder / REPORT, report)
    print(report, flush=True)


def render_report(data: Data, model_name: str, manifest: dict, overlaps: Mapping[str, dict]) -> str:
    """Render in Markdown what was kept, cut and dropped, and what benchmarks share with the rows.

    Args:
        manifest: of the tokens (launch.data.token_cache).
        overlaps: see `find_overlaps`.
    """
    lines = [f"# Tokens of {data.path}", "", *_render_rows(data, model_name, manifest)]
    if overlaps:
        lines += _render_overlaps(overlaps)
    return "\n".join(lines) + "\n"


def render_row_report(recipe: Recipe, rows: RowFolder) -> str:
    """Render in Markdown what was kept, truncated and dropped of rows, and their labels if any."""
    made_from, tokens = rows.manifest["made_from"], rows.open_tokens()
    data = recipe.data.model_copy(
        update={name: made_from["data"][name] for name in ("path", "split", "revision")}
    )
    what = " blocks of text" if made_from["data"].get("text") else ""
    lines = [f"# Tokens of {data.path}", ""]
    lines += _render_counts(data, recipe.model.name, rows.manifest, what, "truncated to")
    if rows.has_classes:
        for place, label in enumerate(recipe.task.labels):
            lines.append(f"| of them, labelled {label} | {int((tokens.labels == place).sum())} |")
    elif made_from["task"]:
        least, most = tokens.labels.min().item(), tokens.labels.max().item()
        lines.append(f"| labels | {least:g} to {most:g} |")
    lengths = tokens.lengths()
    lines += [
        "",
        f"{rows.manifest['tokens']} tokens, at most {int(lengths.max())} in a row; "
        f"SHA-256 {rows.manifest['tokens_sha256']}.",
        *_render_examples(rows.manifest),
    ]
    return "\n".join(lines) + "\n"


def render_mix_report(
    data: Data, model_name: str, tokens: TokenFolder, overlaps: Mapping[str, dict]
) -> str:
    """Render in Markdown what a mix has of each source, and of each what `render_report` says."""
    manifest = tokens.manifest
    head = ["source", "weight", "count", "rows of an epoch", "available", "held out", "repeats"]
    lines = [
        f"# Tokens of {data.label}",
        "",
        f"{manifest['kept']} rows, those of an epoch and those held out; {manifest['tokens']} tokens, "
        f"{manifest['answer_tokens']} of them of answers; SHA-256 {manifest['tokens_sha256']}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for name, rows in data.sources.items():
        share = manifest["shares"][name]
        amount = ["" if rows.weight is None else f"{rows.weight:g}", rows.count or ""]
        cells = [name, *amount, share["rows"], share["available"], share["held_out"], rows.repeats]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    said = results.describe_data(
        results.DataRecord.model_validate(describe_mixed_tokens(tokens, data))
    )
    for subject, line in said[len(data.sources) :]:  # the table has what is before
        lines += ["", f"{subject}: {line}."]
    for name, source in data.list_sources().items():
        lines += ["", f"## {name}: {source.path}", ""]
        part = rename_notes(manifest["parts"][name], f"data.sources.{name}", MixedRows.model_fields)
        lines += _render_rows(source, model_name, part)
    if overlaps:
        lines += _render_overlaps(overlaps)
    return "\n".join(lines) + "\n"


def _render_rows(data: Data, model_name: str, manifest: dict) -> list[str]:
    """Render what was read, kept, cut and dropped of one data set of a causal task, as lines."""
    what = " blocks of text" if data.text_field else ""
    lines = _render_counts(data, model_name, manifest, what, "answer cut at")
    if manifest.get("special"):  # manifests of earlier versions do not have it
        lines.append(f"| of them, {SPECIAL} | {manifest['special']} |")
    lines += [
        "",
        f"{manifest['tokens']} tokens, {manifest['answer_tokens']} of them of answers; "
        f"SHA-256 {manifest['tokens_sha256']}.",
    ]
    if "files_read" in manifest:  # not in manifests of earlier versions
        names = manifest["files_read"]
        more = f" and {len(names) - NUM_FILES} more" if len(names) > NUM_FILES else ""
        lines += ["", f"Read from {', '.join(names[:NUM_FILES])}{more}."]
    return lines + _render_examples(manifest)


def _render_counts(
    data: Data, model_name: str, manifest: dict, what: str, shortened: str
) -> list[str]:
    """Render the head of a report, as lines: how many rows were read, dropped, kept and shortened."""
    source = manifest["made_from"]["source"]
    revision = f"revision {data.revision}, unverified"
    if "commit" in source:
        revision = f"commit {source['commit']}"
    lines = [
        f"Split {data.split}, {revision}; tokenizer of {model_name}; at most "
        f"{data.max_length} tokens a row.",
        "",
        "| rows | |",
        "|---|---|",
        f"| read | {manifest['read']} |",
        f"| skipped: not in data.filter | {manifest['read'] - manifest['selected']} |",
    ]
    for reason, count in sorted(manifest["dropped"].items()):
        lines.append(f"| dropped: {reason} | {count} |")
    lines += [
        f"| kept | {manifest['kept']}{what} |",
        f"| of them, {shortened} {data.max_length} tokens | {manifest['cut']} |",
    ]
    return lines


def _render_examples(manifest: dict) -> list[str]:
    """Render the notes on the rows and the first rows of each reason, as lines."""
    lines = []
    for note in manifest.get("notes", ()):  # manifests of earlier versions have none
        lines += ["", f"{note}."]
    if not manifest["examples"]:
        return lines
    lines += ["", "First rows of each reason:", ""]
    for _, rows in sorted(manifest["examples"].items()):
        lines += [f"- row {row}: {what}" for row, what in rows]
    return lines


def _render_overlaps(overlaps: Mapping[str, dict]) -> list[str]:
    """Render the report's part on benchmarks, as lines."""
    lines = [
        "",
        "## Overlap with benchmarks",
        "",
        "| benchmark | rows | share a question | share 13 words only | problems met | "
        "left out as phrases |",
        "|---|---|---|---|---|---|",
    ]
    for name, overlap in overlaps.items():
        lines.append(
            f"| {name} | {overlap['rows']} | {overlap['question']} | {overlap['13-gram']} | "
            f"{overlap['problems']} of {overlap['of']} | {overlap['phrases']} 13-grams |"
        )
    lines.append("")
    for overlap in overlaps.values():
        for example in overlap["examples"]:
            of_source = f" of {example['source']}" if "source" in example else ""
            lines.append(
                f"- row {example['row']}{of_source} and {example['problem']} share a {example['shares']}: "
                f"{example['text']}"
            )
    return lines
