"""Refuse to show or to choose among runs that were made with different inputs."""

import json
from collections.abc import Iterator
from pathlib import Path

from launch.config.schema import Recipe
from launch.run.results import RunResults, find_run_results
from launch.runtime.errors import UserError
from launch.sweeps.table import Sweep

PACKAGES = ("torch", "transformers", "peft")  # that decide what a forward pass computes


def check_inputs(sweep: Sweep) -> None:
    """Refuse runs side by side that were made with different content of the same input.

    Raises:
        UserError: two runs with the same fields of an input had different content of it, or other
            versions of the packages that compute.
    """
    seen: dict[str, tuple[str, Path]] = {}  # input and its fields -> its content, and whose
    for run in sweep.list_all_runs():
        folder = sweep.find_folder(run)
        results = find_run_results(folder)
        if results is None:
            continue
        for name, fields, content in _list_inputs(run.recipe, results):
            key = json.dumps([name, fields])
            first, where = seen.setdefault(key, (content, folder))
            if content != first:
                raise UserError(
                    f"--table: {folder} was made with another {name} than {where} "
                    f"({content[:12]}, not {first[:12]}); remove the older runs, or give "
                    "--output and --keep other folders"
                )


def _list_inputs(recipe: Recipe, results: RunResults) -> Iterator[tuple[str, list, str]]:
    """Yield what a run was made with, where that is known.

    Yields:
        Name of the input, values of the recipe's fields that decide it, and its content.
    """
    model, data, settings = recipe.model, recipe.data, recipe.eval
    weights = [model.name, model.revision]
    if results.base.weights_sha256 is not None:
        yield f"content of model.name {model.name}", weights, results.base.weights_sha256
    if results.base.config_sha256 is not None:
        yield f"config.json of model.name {model.name}", weights, results.base.config_sha256
    # Tokens also depend on a chat template, and on which fields of a row are its texts and its label.
    task = recipe.task.model_dump(exclude={"name", "dev"})
    tokens = [weights, data.token_fields(), data.chat_template, task]
    yield f"content of {data.field} {data.label}", tokens, results.data.tokens_sha256
    for name, dev in results.data.dev.items():
        fields = [*tokens, recipe.task.model_dump()]
        yield f"content of task.dev {name}", fields, dev.tokens_sha256
    rows = recipe.calibration_source
    if rows is not None and results.calibration_data is not None:
        fields = [weights, rows.token_fields()]
        content = results.calibration_data.tokens_sha256
        yield f"content of calibration.data {rows.path}", fields, content
    yield "dtype", [model.dtype], results.dtype
    for package in PACKAGES:
        version = getattr(results.conditions, package, None)  # not in every earlier record
        if version is not None:
            yield f"version of {package}", [], version
    if results.other_text_source is not None:
        content = results.other_text_source["sha256"]
        yield f"content of eval.other_text {settings.other_text}", [], content
    for benchmark, score in results.scores.items():
        if score.data_sha256 is not None:
            fields = [settings.data_dir, settings.limit]
            yield f"content of benchmark {benchmark}", fields, score.data_sha256
