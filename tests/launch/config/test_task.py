"""The section `task` refuses what does not go together, and changes no recipe that lacks it.

Needs nothing. Takes 2 s.
"""

import pytest

from launch.config.loading import read_recipe
from launch.runtime.errors import UserError

NONE = "eval.suites=[]"  # of the recipe that is changed here
PAIRS = ["task.kind=classification", "task.labels=[0, 1]", "task.sentence1=a", "task.sentence2=b"]


def test_labels_may_be_numbers_and_scores_have_the_tasks_name() -> None:
    task = read_recipe("metamath", [NONE, *PAIRS, "task.name=mrpc", "task.dev=validation"]).task
    assert task.labels == ["0", "1"]
    assert (task.has_head, len(task.labels)) == (True, 2)
    assert task.dev_sets == {"mrpc": "validation"}
    several = "task.dev={mnli: validation_matched, mnli_mm: validation_mismatched}"
    assert len(read_recipe("metamath", [NONE, *PAIRS, several]).task.dev_sets) == 2
    regression = [NONE, "task.kind=regression", "task.sentence1=a", "train.head_lr=1e-3"]
    assert read_recipe("metamath", regression).task.has_head
    assert not read_recipe("metamath", []).task.has_head


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task.kind=classification", "task.sentence1=a"], r"task\.labels: .* at least two"),
        ([*PAIRS, "task.labels=[0, 0]"], r"task\.labels: '0' is there twice"),
        ([*PAIRS, "task.kind=regression"], r"task\.labels: a regression's labels are numbers"),
        (["task.kind=regression"], r"task\.sentence1: regression needs the field"),
        (["task.labels=[0, 1]"], r"task\.labels: is for rows with labels; set task\.kind"),
        (
            [*PAIRS, "task.dev={held_out: validation}"],
            r"task\.dev: held_out is the name of another",
        ),
        (["task.dev=validation"], r"task\.dev: is for rows with labels"),
        (["train.head_lr=1e-3"], r"train\.head_lr: a causal task has no new head"),
        ([*PAIRS, "data.packing=true"], r"data\.packing: is for causal tasks only"),
        ([*PAIRS, "eval.suites=[gsm8k]"], r"eval\.suites: is for causal tasks only"),
        ([*PAIRS, "eval.baseline=true"], r"eval\.baseline: is for causal tasks only"),
        ([*PAIRS, "data.input=x"], r"data\.input: is for causal tasks only"),
        ([*PAIRS, "calibration.statistics=reference"], r"calibration\.statistics: is for causal"),
        ([*PAIRS, "task.sentence3=x"], r"task\.sentence3: unknown key; did you mean"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        read_recipe("metamath", [NONE, *settings])
