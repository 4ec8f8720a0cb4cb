"""Tokens of calibration.data: rows or plain text to calibrate on, apart from the training rows."""

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

from launch.config.rows import SHORT_NAMES, CalibrationRows
from launch.config.schema import Recipe, SourceData
from launch.data.manifest import check_refused_rows
from launch.data.rows import fetch_source, naming_fields
from launch.data.task_rows import (
    TRUNCATED,
    RowFolder,
    check_token_types,
    obtain_unlabelled_rows,
    read_base,
)
from launch.data.token_cache import TokenFolder, make_tokens, obtain_tokens
from launch.runtime.errors import UserError

# The section and its fields, as naming_fields and rename_notes take them.
CALIBRATION_NAMES = ("calibration.data", CalibrationRows.model_fields)
_PATH = "calibration.data.path: "


def obtain_calibration_tokens(data: SourceData, model_path: Path) -> TokenFolder:
    """Find the tokens of calibration.data, or make them, as `obtain_tokens` does. Raises UserError."""
    with _naming_calibration_data(data):
        return obtain_tokens(data, model_path)


def prepare_calibration_tokens(folder: Path, data: SourceData, model_path: Path) -> TokenFolder:
    """Make the tokens of calibration.data in `folder`; see `make_tokens`. Raises UserError."""
    with _naming_calibration_data(data):
        tokens = make_tokens(folder, data, model_path, fetch_source(data), verify=True)
        check_refused_rows(tokens.manifest, data)
        return tokens


def obtain_calibration_rows(
    recipe: Recipe, model_path: Path, output: Path | None = None
) -> RowFolder:
    """Find or make the rows of calibration.data of a task with a head, without labels.

    Args:
        output: folder to make them in, in the place of the cache.

    Raises:
        UserError: rows cannot be read, or there are some that the recipe refuses.
    """
    data = recipe.calibration_source
    base = read_base(recipe.task, model_path)
    with _naming_calibration_data(data):
        rows = obtain_unlabelled_rows(data, base, output)
        check_refused_rows(rows.manifest, data, cut=TRUNCATED)
    check_token_types(rows.open_tokens(), base.config)
    return rows


@contextlib.contextmanager
def _naming_calibration_data(data: SourceData) -> Iterator[None]:
    """Let errors name the fields of calibration.data in the place of those of the training rows.

    One about a path that is nearly a short name says that name.
    """
    try:
        with naming_fields(*CALIBRATION_NAMES):
            yield
    except UserError as error:
        line = str(error).replace("to train on", "to calibrate on")
        line = line.replace("trained on", "calibrated on")
        near = difflib.get_close_matches(data.path, SHORT_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near and line.startswith(_PATH) else ""
        raise UserError(line + hint) from None
