"""results.json: the one record of what a finished run, or a finished evaluation, gave.

Everything that reads results.json reads it here, as a typed record. Keys are only ever added, so that files written by
earlier versions stay readable: a key that an old file may lack has a default.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from launch.runtime.errors import UserError
from launch.runtime.files import write_json
from launch.runtime.units import GIB

# In the folder of a run or an evaluation; written last, it marks it as finished.
RESULTS = "results.json"


class Record(BaseModel):
    """A part of results.json. Keys that this version does not know are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True)


RecordT = TypeVar("RecordT", bound=Record)


class GraderScore(Record):
    """One grader's score of one benchmark."""

    accuracy: float  # mean over problems and their samples, a fraction
    n: int  # problems
    samples: int = 1  # responses to each problem
    correct: int  # problems whose first response passed
    # 95 % interval of the accuracy, fractions. Before several responses were taken into account, it
    # was that of the first responses alone.
    interval: tuple[float, float]
    pass_at: dict[str, float] | None = None  # k -> unbiased pass@k; only with several samples
    # Responses in which this grader finds no answer; left out where there are none, for programs,
    # and by earlier versions.
    no_answer: int | None = None


class Score(GraderScore):
    """The strict grader's score of one benchmark, with the literature's and the conditions of both."""

    literature: GraderScore
    prompt: str  # "recipe", "chat" or "literature"; empty where stored responses were graded again
    grader: str = "strict"
    data_sha256: str | None = None  # of the problems
    # Ids of problems whose prompt was too long for the model; left out where there are none.
    overlong: list[str] | None = None
    # Responses cut off by the limit of new tokens or the context's end; left out where none is
    # known, as of responses that earlier versions made.
    truncated: int | None = None


class TaskRecord(Record):
    """The task of a run with a new head."""

    kind: str  # classification or regression
    labels: list[str]  # by output of the head; empty for a regression
    # By which a decoder's head finds a row's last token; None for an encoder, whose config has it.
    pad_token: int | None


class EpochScore(Record):
    """The score of development rows after one epoch."""

    epoch: float  # epochs done
    step: int
    values: dict[str, float]  # metric -> value, fractions; epochs are compared by the first
    intervals: dict[str, tuple[float, float]] | None = None  # 95 %, by bootstrap over rows
    # "predictions" or "labels" where all of these are the same; None too where it is not known, as
    # without the predictions, and in records of earlier versions.
    constant: str | None = None


class TaskScore(Record):
    """The scores of development rows (task.dev), after the last epoch and after the best one.

    The best epoch is chosen by these very rows, so its score is too high on average.
    """

    metric: str  # by which epochs are compared
    n: int  # rows
    # Share of the most frequent label, the accuracy of a model that always predicts it; None for
    # numbers and in records of earlier versions.
    most_frequent: float | None = None
    last: EpochScore
    best: EpochScore
    epochs: list[EpochScore]
    data_sha256: str | None = None  # as Score has it; the run's `data` has the rows' hash

    @property
    def accuracy(self) -> float:
        """The last epoch's value of `metric`."""
        return self.last.values[self.metric]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of that value; None where the last epoch's predictions were gone."""
        return None if self.last.intervals is None else self.last.intervals[self.metric]


class Base(Record):
    """The base model."""

    name: str  # hub id or folder
    weights_sha256: str | None  # None where a server holds the model
    config_sha256: str | None = None  # launch.models.identity; None in earlier versions' records
    tokenizer_sha256: str | None = None  # only of an evaluation
    revision: str | None = None
    revision_verified: bool = False


class SourceRecord(Record):
    """One of the sets of a mix (data.sources), and what is taken of it."""

    path: str
    tokens_sha256: str  # of all rows that were kept
    kept: int  # rows that can be trained on
    cut: int  # of them, rows whose answer max_length cut short
    dropped: dict[str, int]  # reason -> rows
    rows: int  # of an epoch, repeated ones counted each time
    available: int  # rows of `kept` that are not held out
    held_out: int
    repeats: int
    weight: float | None = None
    count: int | str | None = None  # or "all"


class DevelopmentRows(Record):
    """Rows of task.dev."""

    tokens_sha256: str
    kept: int
    cut: int  # rows that max_length truncated
    trained: int | None = None  # rows whose very tokens are trained on; None: not counted


class DataRecord(Record):
    """The training rows, and those that are scored while training."""

    path: str  # or the names of the sources
    tokens_sha256: str
    rows: int
    cut: int  # rows whose answer max_length cut short
    dropped: dict[str, int]  # reason -> rows
    sources: dict[str, SourceRecord] = {}  # of a mix, by name
    scarce_sources: list[str] = []  # that keep a mix by weights from being larger
    held_out_trained: int = 0  # held-out rows whose very tokens are trained on too
    held_out_calibrated: int | None = None  # of calibration.data, likewise; None: not counted
    dev: dict[str, DevelopmentRows] = {}  # by the name of their score


class Prediction(Record):
    """How well a model predicts given tokens."""

    loss: float  # mean over the tokens, nats
    # Fraction of the tokens that have the largest logit, or of the rows; None for a regression.
    accuracy: float | None
    tokens: int  # or rows with labels


class BeforeAfter(Record):
    """One measurement before and after training."""

    before: Prediction
    after: Prediction


class Seconds(Record):
    """Wall-clock seconds."""

    calibration: float
    training: float
    total: float | None = None  # of the whole run, over all its starts; None in earlier records

    @property
    def whole(self) -> float:
        """All seconds that the record knows of."""
        return self.calibration + self.training if self.total is None else self.total


class Conditions(Record):
    """What the numbers hold for: versions, revision and machine. Other keys are versions of packages."""

    git_revision: str | None
    world_size: int
    nodes: int | None = None  # only of a run; not in earlier versions' records
    device: str

    @property
    def ranks_per_node(self) -> int:
        """The ranks of each node; where nodes have different numbers, a number between them."""
        return self.world_size // (self.nodes or 1)


class CalibrationData(Record):
    """The examples whose activations or gradients the initial factors were made from."""

    path: str  # that the recipe names
    tokens_sha256: str
    examples: int
    tokens: int  # that counted


def describe_source(data: CalibrationData | None) -> str:
    """Say in a few words what initial factors were made from."""
    if data is None:
        return "no calibration data"
    return f"{data.examples} calibration examples of {data.path} ({data.tokens} tokens)"


class RunFacts(Record):
    """What is known of a run before its first step, and kept in every checkpoint for its results."""

    ranks: dict[str, int] | None  # LoRA rank of every module; None where all are alike
    inputs: dict[str, str]  # recipe field -> hash of its content
    calibration_seconds: float
    # None where no example was run, as for lora, pissa or astra haar. Not in earlier versions' records.
    calibration_data: CalibrationData | None = None
    decided: dict[str, Any] = {}  # see RunResults
    logit_drift: float  # see RunResults
    residual_rounding: float  # see RunResults
    baseline: dict[str, Score]  # benchmark -> score of the base
    before: dict[str, Prediction]  # measured set -> prediction of the base


class SmallExport(Record):
    """lora_small/, a LoRA of a smaller rank than lora/."""

    rank: int
    error: float  # Frobenius norm of what it lacks, over that of the whole change, all modules
    worst_module: str
    worst_error: float  # of that module alone
    held_out: Prediction | None = None  # with it; None where data.held_out is 0


class StepScore(Record):
    """A score after one step."""

    step: int
    value: float


class LastAndBest(Record):
    """A score that was made while the model trained, after the last step and after the best one.

    The best step is chosen by this very score, so its value is too good on average.
    """

    metric: str  # by which steps are compared: loss, of which the lowest is best, or a fraction
    last: StepScore
    best: StepScore | None  # None where no value is finite


class RunResults(Record):
    """results.json of a finished run."""

    recipe: str
    model: str
    base: Base
    data: DataRecord
    note: str | None = None  # of the recipe
    method: str
    variant: str | None = None  # what the method's name leaves open: the end of the spectrum
    eigen_select: str | None = None  # of astra
    rank: int | None  # None where no adapters were trained
    lora_rank: int | None = None  # of the exported plain LoRA; None where there is none
    small: SmallExport | None = None  # only with export.rank
    alpha: float | None
    lr: float
    lr_ratio: float = 1.0  # B's learning rate over that of all else
    seed: int
    steps: int  # that were trained
    planned_steps: int | None = None  # only where train.patience has ended the run before
    # What is exported, scored and measured as `after`: the model after this step, the best by
    # train.keep_best. None without it: after the last step.
    exported_step: int | None = None
    while_training: dict[str, LastAndBest] = {}  # name -> what eval.every brought
    task: TaskRecord | None = None  # None for a causal task
    head_lr: float | None = None  # learning rate of the new head; None where it is lr
    final_loss: float  # of the last step, nats per answer token or, with labels, the mean over rows
    held_out: BeforeAfter | None = None
    other_text: BeforeAfter | None = None
    other_text_source: dict[str, str] | None = None  # path and sha256
    trained_parameters: int | None = None
    peak_memory: list[int] | None = None  # bytes, by rank
    logit_drift: float  # largest change of a logit at step 0, over the largest logit
    residual_rounding: float  # largest |s B0 A0 + W_res - W| / |W| of a module
    engine: str
    shard_within: str = "all"
    dtype: str
    seconds: Seconds
    calibration_data: CalibrationData | None = None  # see RunFacts
    decided: dict[str, Any] = {}  # recipe field that was `auto` -> what was decided
    baseline: dict[str, Score]  # benchmark -> score of the base
    # Benchmark -> score after training; or name of development rows -> their scores by epoch.
    scores: dict[str, Score | TaskScore]
    conditions: Conditions

    @property
    def label(self) -> str:
        """The method with its variant, which is never left out: `astra smallest`, `corda ipm`."""
        variant = self.variant or self.eigen_select
        return f"{self.method} {variant}" if variant else self.method

    @property
    def peak_gib(self) -> float | None:
        """Peak memory in GiB of the rank that had the largest; None where it was not measured."""
        return max(self.peak_memory) / GIB if self.peak_memory else None


class EvaluationResults(Record):
    """results.json of launch/evaluate.py."""

    base: Base
    adapter: str | None
    settings: dict[str, Any]  # the recipe's `eval` section
    scores: dict[str, Score]
    conditions: Conditions
    adapter_sha256: str | None = None
    adapter_config_sha256: str | None = None
    astra_init_sha256: str | None = None  # of the residual base's ../astra_init
    astra_init_config_sha256: str | None = None
    dtype: str | None = None  # None where a server holds the model
    url: str | None = None  # of the server
    sampling: dict[str, float] | None = None  # what requests to the server fix besides `settings`


def read_run_results(folder: Path) -> RunResults:
    """Read results.json of a run. Raises UserError if the folder is not that of a finished run."""
    return _read(folder, RunResults, "a finished run")


def read_evaluation_results(folder: Path) -> EvaluationResults:
    """Read results.json of launch/evaluate.py. Raises UserError if the folder holds none."""
    return _read(folder, EvaluationResults, "a finished evaluation")


def find_run_results(folder: Path) -> RunResults | None:
    """Read results.json of a run, or return None if the run has not finished."""
    return read_run_results(folder) if (folder / RESULTS).is_file() else None


def write_results(folder: Path, results: Record) -> None:
    """Write results.json, whole or not at all. A value that was never set is left out. Raises OSError."""
    write_json(folder / RESULTS, results.model_dump(mode="json", exclude_unset=True))


def _read(folder: Path, kind: type[RecordT], what: str) -> RecordT:
    try:
        values = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return kind.model_validate(values)
    except (OSError, ValueError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else error
        if isinstance(error, ValidationError):
            reason = f"{'.'.join(map(str, reason['loc']))}: {reason['msg']}"
        raise UserError(f"{folder} is not the folder of {what}: {reason}") from None


def describe_task_score(score: TaskScore, exported_step: int | None = None) -> str:
    """Describe scores of development rows in a line: of the last epoch, then of the best.

    Where the exported model is that of another epoch, which other rows chose, its score follows.

    Args:
        exported_step: None for the last.
    """
    described = [("last", score.last), ("best", score.best)]
    if exported_step not in (None, score.last.step, score.best.step):
        exported = [epoch for epoch in score.epochs if epoch.step == exported_step]
        described += [("exported", epoch) for epoch in exported]
    parts = []
    for when, epoch in described:
        shown = f"{score.metric} {epoch.values[score.metric]:.4f}"
        if epoch.intervals is not None:
            low, high = epoch.intervals[score.metric]
            shown += f" ({low:.4f} to {high:.4f})"
        if epoch.constant:
            shown += f", all {epoch.constant} the same"
        parts.append(f"{when} epoch {epoch.epoch:.4g}: {shown}")
    return f"{'; '.join(parts)}; n = {describe_rows(score)}"


def describe_rows(score: Score | TaskScore) -> str:
    """Give the number of rows of a score, with the share of the most frequent label if it has one."""
    if not isinstance(score, TaskScore) or score.most_frequent is None:
        return str(score.n)
    return f"{score.n}, {100 * score.most_frequent:.1f} % of them with the most frequent label"


def describe_data(data: DataRecord) -> list[tuple[str, str]]:
    """Say what of the rows may surprise, and what a mix has of each source.

    Returns:
        Pairs of what is described, such as data.sources.NAME, and what is said of it.
    """
    total = sum(source.rows for source in data.sources.values())
    described = []
    for name, source in data.sources.items():
        line = f"{source.rows} rows, {source.rows / total:.1%} of an epoch, out of "
        line += f"{source.available} in {source.path}"
        if source.rows > source.available:
            line += f", each up to {-(-source.rows // source.available)} times"
        if source.held_out:
            line += f"; {source.held_out} more held out"
        for reason, count in source.dropped.items():
            line += f"; {count} {reason}"
        described.append((f"data.sources.{name}", line))
    return described + _describe_limits(data)


def _describe_limits(data: DataRecord) -> list[tuple[str, str]]:
    """Say what keeps a mix from being larger, and which rows that are kept apart are used too."""
    described = []
    if data.scarce_sources:
        names = " and ".join(data.scarce_sources)
        fields = " and ".join(f"data.sources.{name}.repeats" for name in data.scarce_sources)
        line = f"the mix is as large as the rows of {names} allow; raise {fields} for a larger one"
        described.append(("data.sources", line))
    described += describe_copies(data)
    num_held_out = sum(source.held_out for source in data.sources.values())
    by_path: dict[str, list[str]] = {}
    for name, source in data.sources.items():
        by_path.setdefault(source.path, []).append(name)
    for path, names in by_path.items() if num_held_out else ():
        if len(names) > 1:
            line = (
                f"{' and '.join(names)} read {path}: a row that both read may be held out by the "
                "one and trained on by the other, in another form that is not counted"
            )
            described.append(("data.held_out", line))
    return described


def describe_copies(data: DataRecord) -> list[tuple[str, str]]:
    """Say which rows that are kept apart are used all the same, as the data has them twice."""
    described = []
    if data.held_out_trained:
        counted, where = f"{data.held_out_trained}", ""
        if data.sources:
            num_held_out = sum(source.held_out for source in data.sources.values())
            counted, where = f"{counted} of {num_held_out}", ", as rows of another source"
        line = f"{counted} held-out rows are trained on too{where}: their loss is no held-out loss"
        described.append(("data.held_out", line))
    described += describe_calibrated(data)
    for name, rows in data.dev.items():
        if rows.trained:
            line = (
                f"{rows.trained} of {rows.kept} rows of {name} are trained on too (the same tokens)"
            )
            described.append(("task.dev", line))
    return described


def describe_calibrated(data: DataRecord) -> list[tuple[str, str]]:
    """Say how many held-out rows are calibrated on too; nothing where there are none."""
    if not data.held_out_calibrated:
        return []
    line = f"{data.held_out_calibrated} held-out rows are among those of calibration.data too"
    return [("data.held_out", line)]


def render_runs(folders: Sequence[Path]) -> str:
    """Render finished runs as a Markdown table, one row each.

    Scores are in percent with their 95 % Wilson interval and n. A score that was not made is left empty.
    """
    rows = [read_run_results(folder) for folder in folders]
    benchmarks = sorted({name for row in rows for name in (*row.baseline, *row.scores)})
    head = ["run", "method", "rank", "lr", "seed", "steps", "final loss"]
    # Development rows are scored in training alone, and a base only if asked.
    columns = []
    for name in benchmarks:
        scored_before = any(name in row.baseline for row in rows)
        columns += [(name, when) for when in (["before"] if scored_before else []) + ["after"]]
    head += [f"{name} {when}" for name, when in columns]
    head.append("training (s)")
    lines = [head, ["---"] * len(head)]
    for folder, row in zip(folders, rows, strict=True):
        cells = [folder.resolve().name, row.label, row.rank or "", f"{row.lr:g}", row.seed]
        cells += [row.steps, f"{row.final_loss:.4f}"]
        for name, when in columns:
            score = (row.baseline if when == "before" else row.scores).get(name)
            cells.append("" if score is None else describe_score(score, row.exported_step))
        cells.append(f"{row.seconds.training:.0f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def describe_score(score: Score | TaskScore, exported_step: int | None = None) -> str:
    """Describe a score for a cell: of a benchmark in percent, of development rows in fractions."""
    if isinstance(score, TaskScore):
        return describe_task_score(score, exported_step)
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f}, n = {score.n})"
