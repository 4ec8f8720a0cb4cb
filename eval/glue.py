"""The tasks of GLUE: fields, labels, metrics, splits and files. The one table of them.

Fields, labels and splits are those of the hub's `nyu-mll/glue`, so a label is the index of its name
in `labels`. `rows` are the official sizes, and `file` tells GLUE's own TSV files (see
launch.data.glue_files). Sources: gluebenchmark.com and the data set's card on the hub.

WNLI is left out of tables by convention (its development set contradicts its training set:
gluebenchmark.com/faq, 12); it can be trained like the others.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["classification", "regression"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE."""

    sentence1: str  # field of the first text
    sentence2: str | None  # of the second; None for a task of single texts
    labels: tuple[str, ...]  # names by index; none for a regression
    metrics: tuple[Metric, ...]  # the first is the one that epochs are compared by
    rows: dict[str, int]  # split -> official number of rows
    folder: str  # of the TSV files in GLUE's archive
    columns: dict[str, str]  # field -> its column in the TSV files, where the names differ
    # split of the development rows, or name of the score -> split where there are several
    dev: str | dict[str, str] = "validation"

    @property
    def kind(self) -> Kind:
        """Whether labels are classes or numbers."""
        return "classification" if self.labels else "regression"


GLUE = {
    "cola": GlueTask(
        sentence1="sentence",
        sentence2=None,
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
        rows={"train": 8551, "validation": 1043},
        folder="CoLA",
        columns={},  # its files have no header
    ),
    "sst2": GlueTask(
        sentence1="sentence",
        sentence2=None,
        labels=("negative", "positive"),
        metrics=("accuracy",),
        rows={"train": 67349, "validation": 872},
        folder="SST-2",
        columns={},
    ),
    "mrpc": GlueTask(
        sentence1="sentence1",
        sentence2="sentence2",
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        rows={"train": 3668, "validation": 408},
        folder="MRPC",
        columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    "stsb": GlueTask(
        sentence1="sentence1",
        sentence2="sentence2",
        labels=(),
        metrics=("pearson", "spearman"),
        rows={"train": 5749, "validation": 1500},
        folder="STS-B",
        columns={"label": "score"},
    ),
    "qqp": GlueTask(
        sentence1="question1",
        sentence2="question2",
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        rows={"train": 363846, "validation": 40430},
        folder="QQP",
        columns={"label": "is_duplicate"},
    ),
    "mnli": GlueTask(
        sentence1="premise",
        sentence2="hypothesis",
        labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        rows={"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
        folder="MNLI",
        columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
        dev={"mnli_matched": "validation_matched", "mnli_mismatched": "validation_mismatched"},
    ),
    "qnli": GlueTask(
        sentence1="question",
        sentence2="sentence",
        labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        rows={"train": 104743, "validation": 5463},
        folder="QNLI",
        columns={},
    ),
    "rte": GlueTask(
        sentence1="sentence1",
        sentence2="sentence2",
        labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        rows={"train": 2490, "validation": 277},
        folder="RTE",
        columns={},
    ),
    "wnli": GlueTask(
        sentence1="sentence1",
        sentence2="sentence2",
        labels=("not_entailment", "entailment"),
        metrics=("accuracy",),
        rows={"train": 635, "validation": 71},
        folder="WNLI",
        columns={},
    ),
}

# Of a task that is not one of GLUE's.
METRICS_BY_KIND: dict[Kind, tuple[Metric, ...]] = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
}


def list_metrics(task: str, kind: Kind = "classification") -> tuple[Metric, ...]:
    """Return the metrics of a task; the first is the one that epochs are compared by.

    Args:
        task: a name in `GLUE`, or any other.
        kind: of a task that is not one of GLUE's.
    """
    known = GLUE.get(task)
    return METRICS_BY_KIND[kind] if known is None else known.metrics
