"""launch.runtime.errors: errors of astra and eval name the field or option that users know.

Needs nothing. A few seconds, for imports.
"""

from typing import get_args

import pytest

from astra.errors import AstraError
from astra.errors import Subject as AstraSubject
from eval.errors import EvalError
from eval.errors import Subject as EvalSubject
from launch.runtime.errors import FIELDS, HINTS, UserError, describe_error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (AstraError("mlp is no layer", "targets"), "adapter.targets: mlp is no layer"),
        (AstraError("9 is above 8; lower it", "rank"), "adapter.rank: 9 is above 8; lower it"),
        (AstraError("'tail' is none", "eigen_select"), "adapter.eigen_select: 'tail' is none"),
        (AstraError("1 GiB is below 2", "memory"), "calibration.memory_gib: 1 GiB is below 2"),
        (AstraError("x is not a LoRA", "adapter"), "--adapter: x is not a LoRA"),
        (
            EvalError("Mamba keeps no keys; serve it", "model"),
            "--model: Mamba keeps no keys; serve it, and use --backend openai",
        ),
        (EvalError("x does not answer", "server"), "--url: x does not answer"),
        (
            EvalError("x answers HTTP 404: no such model", "served_model"),
            "--url: x answers HTTP 404: no such model; check --model",
        ),
        (EvalError("nothing in common", "compare"), "--compare: nothing in common"),
        (
            EvalError("no sandbox; run them unprotected", "sandbox"),
            "no sandbox; run them unprotected with --allow-unsandboxed",
        ),
        (
            EvalError("cannot get x from the hub", "data"),
            "cannot get x from the hub; give a folder as data_dir",
        ),
    ],
    ids=lambda value: getattr(value, "subject", ""),
)
def test_users_read_the_field_that_a_subject_is_set_with(error: Exception, text: str) -> None:
    assert describe_error(error) == text


@pytest.mark.parametrize("kind", [AstraError, EvalError, UserError])
def test_errors_without_a_subject_stay_as_they_are(kind: type[Exception]) -> None:
    assert describe_error(kind("data.path: no such file")) == "data.path: no such file"


def test_every_subject_is_known() -> None:
    assert {*get_args(AstraSubject), *get_args(EvalSubject)} == FIELDS.keys() | HINTS.keys()
