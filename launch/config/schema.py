"""The typed recipe: sections, their fields and rules. Every unknown key is refused.

How a YAML file and the command line fill it is in launch.config.loading.
"""

import math
import re
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from eval.tasks import BENCHMARKS, GROUPS, expand_groups
from launch.config.rows import (
    SENTENCES,
    CalibrationRows,
    MixedRows,
    RowSource,
    refuse_text_fields,
)
from launch.config.section import Name, Number, Section, read_number
from launch.config.task import Task
from launch.methods.base import Method, MethodSettings
from launch.methods.registry import METHODS

MIXED_FIELDS = {"weight", "count", "repeats"}  # of MixedRows: how much is taken, not what is read
CALIBRATION_TOKENS = "calibration"  # folder of calibration.data's tokens in data.prepared


def _read_words(value: object) -> object:
    """Read a text, such as all-linear, as a list of one."""
    return [value] if isinstance(value, str) else value


def _read_limit(value: object) -> object:
    """Read a limit: a finite number above 0, `auto`, or None for none."""
    number = read_number(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        if 0 < number < math.inf:
            return float(number)
    elif value in (None, "auto"):
        return value
    # One message; a union of types would give one for each.
    raise PydanticCustomError("limit", "Input should be a number above 0, auto or null")


Limit = Annotated[float | Literal["auto"] | None, PlainValidator(_read_limit)]


class Model(Section):
    """The base model."""

    name: Name = Field(
        description="hub id, local folder, or `quickstart` (a small base that the first run makes)"
    )
    revision: Name = Field("main", description="hub branch, tag or commit of the model")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of the frozen base; auto is bfloat16 on GPUs that have it, else float32",
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = Field(
        "auto",
        description="attention kernels; auto is what transformers prefers for the model, mostly "
        "sdpa",
    )
    new_weights: list[Name] = Field(
        [],
        description="parameters that the model's files lack and method full trains from random "
        "values, by whole names: [lm_head.weight]",
    )


class Data(RowSource):
    """The training rows: those of one data set, or a mix of several."""

    # The field of RowSource, which is required there.
    path: Name | None = Field(
        None,
        description="hub id, folder in the hub's layout or of save_to_disk, or a JSON, JSONL, CSV "
        "(also .gz) or Parquet file; required without `sources`",
    )
    max_length: int = Field(
        512, ge=2, description="tokens of prompt and answer together; longer answers are truncated"
    )
    on_bad_row: Literal["refuse", "drop"] = Field(
        "refuse",
        description="what to do with rows that are empty or not text, or whose prompt fills "
        "max_length",
    )
    on_cut: Literal["keep", "drop", "refuse"] = Field(
        "keep",
        description="what to do with rows whose answer is truncated; refuse takes them for bad "
        "rows",
    )
    prepared: Name | None = Field(
        None,
        description="folder made by launch/prepare.py, in place of the data; made here when null",
    )
    packing: bool = Field(
        False,
        description="put several examples in one sequence of up to max_length, attention within "
        "each",
    )
    held_out: int = Field(
        0,
        ge=0,
        description="keep the last N rows out of training and report their loss; in a mix, each "
        "source gives its share, in addition to the rows trained on",
    )

    messages: Name | None = Field(
        None,
        description="field with a list of messages, in the place of instruction and answer: role "
        "and content, or ShareGPT's from and value; rendered by the chat template",
    )
    chat_template: Name | None = Field(
        None, description="file with the chat template (Jinja); the tokenizer's own when null"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="which of the assistant's messages are learnt"
    )
    sources: dict[Name, MixedRows] = Field(
        {},
        description="a mix, in the place of path: {name: {path, weight or count, repeats, revision, "
        "config, split, instruction, answer, input, messages, text, filter, limit}}",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_sources(cls, values: Any) -> Any:
        """Refuse sources without proper names; null is none, also as a source."""
        if not isinstance(values, dict) or "sources" not in values:
            return values
        sources = values["sources"]
        if sources is None:
            return values | {"sources": {}}
        if not isinstance(sources, dict):
            raise ValueError(
                "sources: each needs a name; write {name: {path: FILE, weight: 1}, ...}"
            )
        sources = {name: rows for name, rows in sources.items() if rows is not None}
        for name in sources:
            if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(
                    f"sources: {name!r} is no name for a source; use letters, digits, - and _"
                )
        return values | {"sources": sources}

    @model_validator(mode="after")
    def _check_messages(self) -> "Data":
        if not self.has_messages:
            field = "the messages of one of data.sources" if self.sources else "data.messages"
            for name in ("chat_template", "train_on"):
                if not self.is_default(name):
                    raise ValueError(f"{name}: is for {field}, which is not set; leave it out")
        if self.messages is not None:
            refuse_text_fields(self, "messages", "messages have")
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> "Data":
        if not self.sources:
            if self.path is None:
                raise ValueError(
                    "path: is required; set it in the recipe or with --set data.path=VALUE, or set "
                    "data.sources"
                )
            return self
        if self.path is not None:
            raise ValueError("sources: data.path is set too; leave one out, such as data.path=null")
        for name in (*RowSource.model_fields, "messages"):
            if not self.is_default(name):
                raise ValueError(
                    f"{name}: with data.sources each source has its own; set data.sources.NAME.{name}, "
                    f"and leave data.{name} out (or at its default, where another recipe is extended)"
                )
        weighted = [name for name, rows in self.sources.items() if rows.weight is not None]
        counted = [name for name in self.sources if name not in weighted]
        if weighted and counted:
            raise ValueError(
                f"sources: {weighted[0]} has a weight and {counted[0]} a count; give all of them the "
                "one or the other"
            )
        self._refuse_same_rows()
        return self

    def _refuse_same_rows(self) -> None:
        """Raise ValueError if two sources read the same rows, held-out ones among them."""
        seen: dict[str, str] = {}
        for name, rows in self.sources.items():
            read = rows.model_dump_json(exclude=MIXED_FIELDS)
            if read in seen:
                raise ValueError(
                    f"sources: {name} reads the same rows as {seen[read]}; leave one out, or set "
                    "repeats"
                )
            seen[read] = name

    @property
    def text_field(self) -> str | None:
        """The field of plain text; None where rows have an instruction and an answer."""
        return None

    @property
    def has_messages(self) -> bool:
        """Whether some of the rows are messages."""
        return any(rows.messages for rows in (self, *self.sources.values()))

    @property
    def is_chat(self) -> bool:
        """Whether the rows are messages, all those with a prompt: plain text has none."""
        prompted = [rows for rows in self.sources.values() if rows.text is None]
        return all(rows.messages for rows in prompted or [self])

    @property
    def num_rows(self) -> int | None:
        """The rows that the fields allow, of a mix those of an epoch; None where the data decide it."""
        if not self.sources:
            return self.limit
        counts = [rows.count for rows in self.sources.values()]
        return sum(counts) if all(isinstance(count, int) for count in counts) else None

    @property
    def field(self) -> str:
        """The field that says which rows these are."""
        return "data.sources" if self.sources else "data.path"

    @property
    def label(self) -> str:
        """The path, or the names of the mixed sources, for people."""
        return f"a mix of {', '.join(self.sources)}" if self.sources else self.path

    def list_sources(self) -> dict[str, "SourceData"]:
        """Return, by name, the data section that each source is read by."""
        found = {}
        for name, rows in self.sources.items():
            fields = rows.model_dump(exclude=MIXED_FIELDS)
            if rows.messages is not None:
                fields |= {"chat_template": self.chat_template, "train_on": self.train_on}
            shared = {key: getattr(self, key) for key in ("max_length", "on_bad_row", "on_cut")}
            found[name] = SourceData(**fields, **shared)
        return found

    def token_fields(self) -> dict:
        """Return the fields that change the tokens' bytes. Not on_bad_row: bad rows are never in.

        `filter` is called `keep`, its old name: the fields are stored with tokens, and are part
        of the name under which tokens are cached. Of a chat template its text counts, not its path.
        """
        excluded = {"prepared", "on_bad_row", "packing", "chat_template"}
        if self.sources:
            excluded |= {*RowSource.model_fields, "messages"}
        else:
            excluded |= {"sources", "held_out"}
        if not self.has_messages:
            excluded |= {"messages", "train_on"}
        fields = self.model_dump(exclude=excluded)
        return {"keep" if name == "filter" else name: value for name, value in fields.items()}


class SourceData(Data):
    """The rows of calibration.data, or of one of data.sources, as tokens are made of them."""

    text: Name | None = Field(None, description="see CalibrationRows and MixedRows")
    sentence1: Name | None = Field(None, description="see CalibrationRows")
    sentence2: Name | None = Field(None, description="see CalibrationRows")

    @property
    def text_field(self) -> str | None:
        return self.text

    def token_fields(self) -> dict:
        """Return the fields that change the tokens' bytes.

        Without plain text they are those of training rows, so both find the same tokens.
        """
        fields = super().token_fields()
        for name in ("text", *SENTENCES):
            if getattr(self, name) is None:
                del fields[name]
        return fields


class Adapter(Section):
    """What is trained: a method and its adapters."""

    method: Literal[*METHODS] = Field(
        "astra",
        description="how the adapters begin: astra, or a method it is compared with; rslora: lora "
        "with s = alpha / sqrt(rank); dora: lora with trained magnitudes; full: no adapters, all "
        "parameters are trained",
    )
    eigen_select: Literal["smallest", "largest", "middle", "random", "haar"] = Field(
        "smallest",
        description="astra: which eigenvectors of the output second moment (the paper: smallest); "
        "random: some of them; haar: none, a random orthonormal basis without calibration",
    )
    start: Literal["projection", "zero"] = Field(
        "projection",
        description="astra: A0 = B0^T W on W_res, or A0 = 0 on W itself, with the same B0",
    )
    corda_mode: Literal["ipm", "kpm"] = Field(
        "ipm",
        description="corda: the largest singular triplets of weight times input moment (ipm), or "
        "the smallest",
    )
    rank: int = Field(128, ge=1, description="r, columns of B")
    alpha: Number = Field(
        128, gt=0, description="the adapter's product is scaled by s = alpha / rank"
    )
    dropout: Number = Field(0.0, ge=0, lt=1, description="probability, on the adapter's input")
    rank_allocation: Literal["uniform", "effective_rank"] = Field(
        "uniform",
        description="astra: `rank` for every module, or the same sum shared by log(1 + effective "
        "rank)",
    )
    targets: Annotated[list[Name], BeforeValidator(_read_words)] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="the linear modules that get an adapter: full names, ends of names, shell "
        "patterns of full names (model.layers.1?.*), or all-linear",
    )
    exclude: Annotated[list[Name], BeforeValidator(_read_words)] = Field(
        [], description="modules that get none although `targets` name them, in the same words"
    )

    @property
    def scaling(self) -> float:
        """s, the factor of the adapters' product, alike for every module."""
        return self.alpha / (math.sqrt(self.rank) if self.method_record.use_rslora else self.rank)

    @property
    def method_record(self) -> Method:
        """What the method needs of a calibration, and what it gives."""
        method = METHODS[self.method]
        if method.variant is not None:
            method = method.by_variant.get(getattr(self, method.variant), method)
        return replace(method, starts_on_residual=False) if self.start == "zero" else method

    @model_validator(mode="after")
    def _check_method_fields(self) -> "Adapter":
        has_spectrum = self.method_record.solution == "subspace"
        in_order = has_spectrum and self.eigen_select != "random"
        if self.rank_allocation == "effective_rank" and not in_order:
            raise ValueError(
                "rank_allocation: effective_rank needs method astra and eigenvectors in order, "
                "not random or haar"
            )
        if self.method_record.trains_all and self.dropout:
            raise ValueError(
                f"dropout: is on an adapter's input, and method {self.method} has no adapters; set "
                "it to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_variants(self) -> "Adapter":
        for field in ("eigen_select", "corda_mode"):
            if self.method_record.variant != field and not self.is_default(field):
                raise ValueError(f"{field}: {self.method} has none; leave it out")
        if self.start != "projection" and self.method_record.variant != "eigen_select":
            raise ValueError(f"start: {self.method} has none, only astra; leave it out")
        return self


class Calibration(Section):
    """How the statistics of the initial factors are measured."""

    samples: int = Field(
        256, ge=1, description="number of examples that calibration runs, chosen by `seed`"
    )
    data: CalibrationRows | None = Field(
        None,
        description="rows or plain text to calibrate on: {path, revision, config, split, "
        "instruction, answer, input, filter, limit, text}, or a short name (wikitext2, nq_open, "
        "alpaca, metamath, codefeedback, commonsense); the training rows when null",
    )
    batch_size: int = Field(
        1, ge=1, description="examples of a calibration batch; a batch is run by one rank"
    )
    seed: int = Field(
        0,
        ge=0,
        description="seed of the choice of examples, of null-space directions and of "
        "eigen_select random and haar",
    )
    memory_gib: Limit = Field(
        "auto",
        description="GiB that calibration may add on each rank, by windows of layers; auto is what "
        "is free before the model is loaded, less the model and a forward pass; no limit when null",
    )
    reduction: Literal["all", "owner"] = Field(
        "all",
        description="who gets the sums over all ranks: every rank, and all compare them; or only "
        "the rank that solves them",
    )
    split_half: bool = Field(
        False,
        description="also measure the angle between the subspaces of two halves; twice the memory",
    )
    statistics: Literal["exact", "reference"] = Field(
        "exact",
        description="astra: exact moments of the outputs, or those of the authors' code (another "
        "prompt, padding counted, each example divided by its largest output)",
    )
    path: Name | None = Field(
        None,
        description="folder made by launch/calibrate.py; the calibration is made here when null",
    )


class Train(Section):
    """The optimiser and its steps."""

    global_batch: int = Field(
        128, ge=1, description="examples of an optimiser step, over all ranks"
    )
    micro_batch: int = Field(
        1, ge=1, description="examples of one forward pass of a rank; accumulation follows"
    )
    epochs: Number = Field(1, gt=0, description="passes over the data")
    max_steps: int | None = Field(
        None, ge=1, description="optimiser steps; overrides epochs when set"
    )
    lr: Number = Field(2e-5, gt=0, description="peak learning rate of AdamW, cosine to 0")
    lr_ratio: Number = Field(
        1,
        gt=0,
        allow_inf_nan=False,
        description="LoRA+: learning rate of B over that of A, which is lr, at every step",
    )
    head_lr: Number | None = Field(
        None, gt=0, description="peak learning rate of a task's new head; `lr` when null"
    )
    warmup_ratio: Number = Field(
        0.03, ge=0, lt=1, description="share of the steps with linear warmup"
    )
    weight_decay: Number = Field(0.0, ge=0, description="AdamW's, decoupled")
    max_grad_norm: Number = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    seed: int = Field(
        42, ge=0, description="seed of the data order, plain lora's factors and dropout"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="recompute activations: less memory, a third more time; auto is true on GPUs "
        "where a step would not fit without it, and false on CPUs",
    )
    compile: bool = Field(
        False, description="compile the model's layers (torch.compile); not with zero3"
    )
    liger: bool = Field(
        False,
        description="Liger's kernels for norms, rotary embeddings and MLPs; needs a GPU and "
        "liger-kernel",
    )
    checkpoint_every: int = Field(
        100,
        ge=1,
        description="optimiser steps between checkpoints; there is also one at the start and the "
        "end",
    )
    keep: int = Field(
        2, ge=1, description="number of checkpoints, the newest, that stay in the run folder"
    )
    keep_best: Name | None = Field(
        None,
        description="also keep the checkpoint that is best by this score, and export it at the end: "
        "held_out or other_text (the lowest loss), a benchmark of eval.every_suites, or a name of "
        "task.dev",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many consecutive scores of keep_best without a better one",
    )


class Eval(Section):
    """What is measured before and after training."""

    suites: list[Literal[*BENCHMARKS, *GROUPS]] = Field(
        [], description="benchmarks to score after training"
    )
    data_dir: str | None = Field(
        None, description="folder with the benchmarks' files, or `quickstart`; the hub when null"
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="number of problems of each benchmark, the first ones; all when null",
    )
    other_text: Name | None = Field(
        None,
        description="text outside the task, JSONL with a field text or .txt, to measure forgetting",
    )
    prompt: Literal["recipe", "chat", "literature"] = Field(
        "recipe",
        description="Alpaca's prompt, as in training; the question as a user's message in the chat "
        "template; or each benchmark's published prompt with its stop strings",
    )
    chat_template: Name | None = Field(
        None, description="file with the template of prompt chat; the tokenizer's own when null"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of a response; each benchmark's published number when null",
    )
    batch_size: int = Field(16, ge=1, description="problems generated at once on a rank")
    samples: int = Field(
        1, ge=1, description="responses to each problem; above 1 with a temperature, for pass@k"
    )
    temperature: Number = Field(0.0, ge=0, description="0 is greedy")
    seed: int = Field(
        0, ge=0, description="seed of sampling, with the problem's name and the sample's number"
    )
    timeout: Number = Field(
        10.0, gt=0, description="seconds of processor time, or of sleep, for a generated program"
    )
    allow_unsandboxed: bool = Field(
        False, description="run generated programs even where no sandbox works"
    )
    baseline: bool = Field(False, description="also score the base model before training")
    every: int | None = Field(
        None,
        ge=1,
        description="optimiser steps between scores while training: held-out loss, loss on "
        "other_text and every_suites; only before and after training when null",
    )
    every_suites: list[Literal[*BENCHMARKS, *GROUPS]] = Field(
        [], description="benchmarks that are also scored while training, with one response each"
    )
    every_limit: int | None = Field(
        None, ge=1, description="number of their problems, the first ones; `limit` when null"
    )

    @property
    def while_training(self) -> "Eval":
        """The settings of the scores while training."""
        values = {"suites": self.every_suites, "limit": self.every_limit or self.limit}
        return self.model_copy(update=values | {"samples": 1})

    @model_validator(mode="after")
    def _check_every(self) -> "Eval":
        if self.every is None and self.every_suites:
            raise ValueError("every_suites: are scored every `every` steps; set eval.every too")
        if self.every_limit is not None and not self.every_suites:
            raise ValueError("every_limit: is for eval.every_suites, which is empty; leave it out")
        return self

    @model_validator(mode="after")
    def _check_chat_template(self) -> "Eval":
        if self.chat_template is not None and self.prompt != "chat":
            raise ValueError("chat_template: is for prompt chat; leave it out, or set prompt=chat")
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> "Eval":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "samples: above 1 they need a temperature above 0, or all are the same"
            )
        return self


# Fields of Eval that are options of launch/evaluate.py.
EVAL_OPTIONS = tuple(
    name
    for name in Eval.model_fields
    if name not in ("suites", "other_text", "baseline", "every", "every_suites", "every_limit")
)


class Export(Section):
    """What a finished run writes besides its adapters."""

    rank: int | None = Field(
        None,
        ge=1,
        description="also write lora_small/, a plain LoRA of this rank, cut from lora/ by SVD; its "
        "held-out loss and error are measured",
    )
    merged: bool = Field(
        False, description="also write merged/, the whole model with the adapter merged into it"
    )


class Recipe(Section):
    """Everything that decides a run."""

    model: Model
    data: Data
    task: Task = Task()
    adapter: Adapter = Adapter()
    calibration: Calibration = Calibration()
    train: Train = Train()
    eval: Eval = Eval()
    export: Export = Export()
    engine: Literal["zero3", "zero3_offload", "fsdp", "zero2", "single", "auto"] = Field(
        "zero3",
        description="zero3 and fsdp shard everything; zero3_offload also keeps the shards in the "
        "CPUs' memory; zero2 keeps the base whole on each rank; single is one process; auto is what "
        "launch/plan.py recommends for this machine",
    )
    note: Name | None = Field(
        None,
        description="a sentence that stands in the results, the model card and every report: what "
        "must be known of the run beside its fields",
    )
    shard_within: Literal["all", "node"] = Field(
        "all",
        description="fsdp, zero3: the base is sharded over all ranks, or over each node's, which "
        "takes more memory and gathers no frozen weight from another node",
    )
    tracking: list[Literal["tensorboard", "wandb"]] = Field(
        [],
        description="where metrics also go; each needs its package (wandb is offline without "
        "network)",
    )

    @model_validator(mode="after")
    def _check_new_weights(self) -> "Recipe":
        if self.model.new_weights and not self.adapter.method_record.trains_all:
            raise ValueError(
                "model.new_weights: an adapter's folder cannot hold them; set adapter.method=full"
            )
        return self

    @model_validator(mode="after")
    def _check_lr_ratio(self) -> "Recipe":
        if self.train.lr_ratio != 1 and self.adapter.method_record.trains_all:
            raise ValueError(
                f"train.lr_ratio: is B's rate over A's, and method {self.adapter.method} has "
                "neither; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_task(self) -> "Recipe":
        if not self.task.has_head:
            if self.train.head_lr is not None:
                raise ValueError(
                    "train.head_lr: a causal task has no new head; leave it out, or set task.kind"
                )
            return self
        causal_only = {
            "model.new_weights": bool(self.model.new_weights),
            "data.packing": self.data.packing,
            "data.input": self.data.input is not None,
            "data.messages": self.data.messages is not None,
            "data.sources": bool(self.data.sources),
            "eval.suites": bool(self.eval.suites),
            "eval.every_suites": bool(self.eval.every_suites),
            "eval.other_text": self.eval.other_text is not None,
            "eval.baseline": self.eval.baseline,
            "calibration.statistics": self.calibration.statistics != "exact",
        }
        for field, is_set in causal_only.items():
            if is_set:
                raise ValueError(
                    f"{field}: is for causal tasks only, not for {self.task.kind}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _check_calibration_rows(self) -> "Recipe":
        rows = self.calibration.data
        if rows is None:
            return self
        if not self.task.has_head:
            if rows.sentence1 is not None:
                raise ValueError(
                    "calibration.data.sentence1: is for tasks with a head; set instruction and "
                    "answer, or text"
                )
            return self
        if self.statistic == "gradient":
            raise ValueError(
                f"calibration.data: {self.label} takes the gradient of the task's own loss, so its "
                "rows; leave it out"
            )
        for name in ("instruction", "answer", "input"):
            if not rows.is_default(name):
                raise ValueError(
                    f"calibration.data.{name}: rows of a {self.task.kind} have no such field; set "
                    "sentence1 or text; in the place of a short name that sets it, give the path"
                )
        return self

    @model_validator(mode="after")
    def _check_shard_within(self) -> "Recipe":
        if self.shard_within == "node" and self.engine not in ("fsdp", "zero3"):
            raise ValueError(
                f"shard_within: node is for engines fsdp and zero3, not {self.engine}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> "Recipe":
        if self.train.compile and self.engine.startswith("zero3"):
            raise ValueError(
                "train.compile: zero3 gathers weights inside the layers; set engine=fsdp, zero2 or "
                "single"
            )
        return self

    @model_validator(mode="after")
    def _check_calibration(self) -> "Recipe":
        settings = self.calibration
        needs_spectrum = settings.statistics != "exact" or settings.split_half
        if needs_spectrum and self.adapter.method_record.solution != "subspace":
            field = "split_half" if settings.split_half else "statistics"
            if self.adapter.eigen_select == "haar":  # refused with other methods
                raise ValueError(
                    f"calibration.{field}: eigen_select haar has no use for it, only astra's "
                    "eigenvectors; leave it out"
                )
            raise ValueError(
                f"calibration.{field}: {self.adapter.method} has no use for it, only astra; leave it "
                "out"
            )
        if settings.path is not None and self.adapter.eigen_select == "haar":
            raise ValueError(
                "calibration.path: eigen_select haar takes no calibration; leave it out"
            )
        if settings.data is not None:
            if self.statistic in (None, "weight"):
                raise ValueError(f"calibration.data: {self.label} runs no examples; leave it out")
            if settings.statistics == "reference":
                raise ValueError(
                    "calibration.data: the reference statistics are of training rows; leave it out"
                )
        if settings.statistics == "reference" and settings.batch_size != 1:
            raise ValueError(
                "calibration.batch_size: the reference statistics take one example at a time; set "
                "it to 1"
            )
        return self

    @model_validator(mode="after")
    def _check_messages(self) -> "Recipe":
        if self.calibration.statistics == "reference" and (self.data.messages or self.data.sources):
            raise ValueError(
                "calibration.statistics: the reference statistics are of an instruction and an "
                f"answer, not of data.{'sources' if self.data.sources else 'messages'}; set exact"
            )
        if self.data.has_messages:
            has_suites = bool(self.eval.suites or self.eval.every_suites)
            if self.data.is_chat and has_suites and self.eval.prompt == "recipe":
                raise ValueError(
                    "eval.prompt: recipe is Alpaca's prompt, by which data.messages are not trained; "
                    "set chat"
                )
            if self.eval.prompt == "chat" and self.eval.chat_template != self.data.chat_template:
                raise ValueError(
                    "eval.chat_template: is not data.chat_template, by which messages are trained; "
                    "set it to the same"
                )
        return self

    @model_validator(mode="after")
    def _check_scores(self) -> "Recipe":
        taken = [name for name in ("held_out", "other_text") if name in self.task.dev_sets]
        if taken:
            raise ValueError(f"task.dev: {taken[0]} is the name of another score; choose another")
        names = [*self.measured_names, *expand_groups(self.eval.every_suites)]
        if self.eval.every is not None and not names:
            raise ValueError(
                "eval.every: there is nothing to score; set data.held_out, eval.other_text or "
                "eval.every_suites"
            )
        names = [*(names if self.eval.every is not None else []), *self.task.dev_sets]
        best = self.train.keep_best
        if best is None and self.train.patience is not None:
            raise ValueError(
                "train.patience: waits for a better score; name it with train.keep_best"
            )
        if best is not None and best not in names:
            known = f"choose of {', '.join(names)}" if names else "set eval.every"
            raise ValueError(f"train.keep_best: {best} is not scored while training; {known}")
        return self

    @model_validator(mode="after")
    def _check_export(self) -> "Recipe":
        method, wanted = self.adapter.method_record, self.export
        if method.trains_all and (wanted.rank or wanted.merged):
            field = "merged" if wanted.merged else "rank"
            raise ValueError(
                f"export.{field}: method {self.adapter.method} writes the whole model, model/, "
                "already; leave it out"
            )
        if wanted.rank and method.use_dora:
            raise ValueError(
                "export.rank: no plain LoRA equals dora's adapter; set export.merged=true instead"
            )
        rank = self.adapter.rank * (2 if method.starts_on_residual else 1)
        if wanted.rank and wanted.rank > rank:
            raise ValueError(
                f"export.rank: {wanted.rank} is above {rank}, the rank of lora/, which is exact; "
                "lower it"
            )
        return self

    @property
    def measured_names(self) -> list[str]:
        """The sets whose loss is measured before and after training."""
        names = ["held_out"] if self.data.held_out > 0 else []
        if self.eval.other_text is not None:
            names.append("other_text")
        return names

    @property
    def calibration_source(self) -> SourceData | None:
        """The data section that calibration tokens are read by; None where the training rows are used."""
        rows, data = self.calibration.data, self.data
        if rows is None:
            return None
        prepared = data.prepared and f"{data.prepared}/{CALIBRATION_TOKENS}"
        fields = rows.model_dump()
        if self.task.has_head and rows.text is None and rows.sentence1 is None:
            fields |= {"sentence1": self.task.sentence1, "sentence2": self.task.sentence2}
        return SourceData(
            **fields,
            max_length=data.max_length,
            on_bad_row=data.on_bad_row,
            prepared=prepared,
        )

    @property
    def statistic(self) -> str | None:
        """What a calibration sums for each module (astra.moments.Statistic); None if nothing."""
        if self.calibration.statistics == "reference":
            return "scaled output"
        return self.adapter.method_record.statistic

    @property
    def variant(self) -> str | None:
        """What the method's name leaves open; it stands beside the name wherever results do."""
        field = self.adapter.method_record.variant
        words = [] if field is None else [getattr(self.adapter, field)]
        if self.calibration.statistics == "reference":
            words.append("reference")
        if self.adapter.start == "zero":
            words.append("zero start")
        if self.train.lr_ratio != 1:
            words.append(f"lr_ratio {self.train.lr_ratio:g}")
        return " ".join(words) or None

    @property
    def label(self) -> str:
        """The method with its variant, as `RunResults.label` has it."""
        return f"{self.adapter.method} {self.variant}" if self.variant else self.adapter.method

    def method_settings(self) -> MethodSettings:
        """Return the fields that a method may depend on."""
        return MethodSettings(
            scaling=self.adapter.scaling,
            eigen_select=self.adapter.eigen_select,
            corda_mode=self.adapter.corda_mode,
            calibration_seed=self.calibration.seed,
            train_seed=self.train.seed,
            start=self.adapter.start,
        )


def find_section(annotation: Any) -> type[Section] | None:
    """Return the section that a field of type `annotation` holds, if any.

    It may hold one in a mapping or a list, or None beside it.
    """
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(find_section, get_args(annotation))), None)
