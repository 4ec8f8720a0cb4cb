"""Tokens of calibration.data: rows or plain text to calibrate on, apart from the training rows."""

import contextlib
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from launch.config.rows import SHORT_NAMES, CalibrationRows
from launch.config.schema import CalibrationTokens
from launch.data.sources import fetch_source
from launch.data.token_cache import TokenFolder, check_refused_rows, make_tokens, obtain_tokens
from launch.runtime.errors import UserError

_PATH = "calibration.data.path: "
_FIELDS = re.compile(rf"(?<![\w./])data\.({'|'.join(CalibrationRows.model_fields)})\b")


def obtain_calibration_tokens(data: CalibrationTokens, model_path: Path) -> TokenFolder:
    """Find the tokens of calibration.data, or make them, as `obtain_tokens` does. Raises UserError."""
    with _naming_calibration_data(data):
        return obtain_tokens(data, model_path)


def prepare_calibration_tokens(
    folder: Path, data: CalibrationTokens, model_path: Path
) -> TokenFolder:
    """Make the tokens of calibration.data in `folder`; see `make_tokens`. Raises UserError."""
    with _naming_calibration_data(data):
        tokens = make_tokens(folder, data, model_path, fetch_source(data), verify=True)
        check_refused_rows(tokens.manifest, data)
        return tokens


@contextlib.contextmanager
def _naming_calibration_data(data: CalibrationTokens) -> Iterator[None]:
    """Let errors name the fields of calibration.data in the place of those of the training rows.

    One about a path that is nearly a short name says that name.
    """
    try:
        yield
    except UserError as error:
        line = _FIELDS.sub(r"calibration.data.\1", str(error))
        line = line.replace("to train on", "to calibrate on").replace("trained on", "calibrated on")
        near = difflib.get_close_matches(data.path, SHORT_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near and line.startswith(_PATH) else ""
        raise UserError(line + hint) from None
