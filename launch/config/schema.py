"""The typed recipe: one YAML file, overrides from the command line, every unknown key refused."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from eval.tasks import GROUPS, TASKS
from launch.runtime.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

Name = Annotated[str, StringConstraints(min_length=1)]


def _number(value: object) -> object:
    """YAML 1.1 reads 2e-5, without a dot, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """A part of a recipe. Strict: 3 is not "3", and true is not 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


SectionT = TypeVar("SectionT", bound=Section)


class Model(Section):
    name: Name = Field(
        description="hub id, local folder, or `quickstart` (a small base that the first run pretrains)"
    )
    revision: Name = Field("main", description="hub branch, tag or commit of the model")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen base; auto is bfloat16 on GPUs and float32 on CPUs"
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = Field(
        "auto",
        description="kernels of attention; auto is what transformers prefers for the model, mostly sdpa",
    )


class Data(Section):
    path: Name = Field(
        description="hub id, a folder in the hub's layout, or a JSON, JSONL (.gz too) or Parquet file"
    )
    revision: Name = Field("main", description="hub branch, tag or commit of the data")
    config: Name | None = Field(None, description="configuration of a data set that has several")
    split: Name = Field("train", description="split of the data set")
    instruction: Name = Field("query", description="field of a row that holds the instruction")
    answer: Name = Field("response", description="field of a row that holds the answer")
    input: Name | None = Field(
        None,
        description="field with an instruction's input; where it is not empty Alpaca's prompt with input is used",
    )
    keep: dict[Name, Name | list[Name]] = Field(
        {},
        description="field: text or pattern, or a list of them, that a row must match, e.g. {type: [GSM_*, MATH_*]}",
    )
    limit: int | None = Field(
        None, ge=1, description="rows; the first so many that `keep` lets through; all when null"
    )
    max_length: int = Field(
        512, ge=2, description="tokens of prompt and answer together; the rest is cut"
    )
    on_bad_row: Literal["refuse", "drop"] = Field(
        "refuse",
        description="rows that are empty or not text, or whose prompt fills max_length; drop counts them",
    )
    on_cut: Literal["keep", "drop", "refuse"] = Field(
        "keep",
        description="rows whose answer max_length cuts short: kept without their end and counted, or bad rows",
    )
    prepared: Name | None = Field(
        None, description="folder by launch/prepare.py: no data is read; made here when null"
    )
    packing: bool = Field(
        False,
        description="several rows of a step to one sequence of up to max_length, attention within each row",
    )
    held_out: int = Field(
        0, ge=0, description="rows, the last that were read, kept from training for a held-out loss"
    )

    def of_tokens(self) -> dict:
        """The fields that change the tokens' bytes. Not on_bad_row: bad rows are never in."""
        return self.model_dump(exclude={"prepared", "on_bad_row", "packing", "held_out"})


class Adapter(Section):
    method: Literal[
        "astra",
        "lora",
        "rslora",
        "dora",
        "pissa",
        "milora",
        "olora",
        "corda",
        "eva",
        "lora_ga",
        "full",
    ] = Field(
        "astra",
        description="astra, or what it is compared with: other initial factors; rslora: lora with "
        "s = alpha / sqrt(rank); dora: lora with trained magnitudes; full: no adapter, all parameters are trained",
    )
    eigen_select: Literal["smallest", "largest", "middle", "random"] = Field(
        "smallest",
        description="astra: which eigenvectors of the output second moment (the paper: smallest)",
    )
    corda_mode: Literal["ipm", "kpm"] = Field(
        "ipm",
        description="corda: the r largest singular triplets of weight times input moment (ipm), or the smallest",
    )
    rank: int = Field(128, ge=1, description="r, columns of B")
    alpha: Number = Field(
        128, gt=0, description="the adapter's product is scaled by s = alpha / rank"
    )
    dropout: Number = Field(0.0, ge=0, lt=1, description="probability, on the adapter's input")
    rank_allocation: Literal["uniform", "effective_rank"] = Field(
        "uniform",
        description="astra: rank for every module, or the same sum shared by log(1 + effective rank)",
    )
    targets: list[Name] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names, or last parts of names, of the linear modules that get an adapter",
    )

    @model_validator(mode="after")
    def _fields_fit_the_method(self) -> "Adapter":
        if self.rank_allocation == "effective_rank" and (
            self.method != "astra" or self.eigen_select == "random"
        ):
            raise ValueError(
                "rank_allocation: effective_rank needs method astra and eigenvectors in order, not random"
            )
        if self.method == "full" and self.dropout:
            raise ValueError(
                "dropout: is on an adapter's input, and method full has no adapters; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _variants_are_of_the_method(self) -> "Adapter":
        if self.method != "astra" and self.eigen_select != "smallest":
            raise ValueError(f"eigen_select: {self.method} has none; leave it out")
        if self.method != "corda" and self.corda_mode != "ipm":
            raise ValueError(f"corda_mode: {self.method} has none; leave it out")
        return self


class Calibration(Section):
    samples: int = Field(
        256, ge=1, description="training rows that calibration runs, a seeded choice"
    )
    batch_size: int = Field(
        1, ge=1, description="rows of a calibration batch; batches are dealt whole to ranks"
    )
    seed: int = Field(
        0,
        ge=0,
        description="of the choice of rows, of null-space directions and of eigen_select: random",
    )
    memory_gib: Number | None = Field(
        None,
        gt=0,
        description="GiB that calibration may add on each rank: layers are taken in windows; all when null",
    )
    split_half: bool = Field(
        False,
        description="also measure how far the subspaces of the samples' two halves are apart; twice the memory",
    )
    statistics: Literal["exact", "reference"] = Field(
        "exact",
        description="astra: exact moments of the outputs, or as the authors' code has them (another prompt, padding "
        "counted, each row divided by its largest output)",
    )
    path: Name | None = Field(
        None, description="folder of a calibration by launch/calibrate.py; made here when null"
    )


class Train(Section):
    global_batch: int = Field(128, ge=1, description="rows of an optimiser step, over all ranks")
    micro_batch: int = Field(
        1, ge=1, description="rows of one forward pass of a rank; accumulation is derived"
    )
    epochs: Number = Field(1, gt=0, description="passes over the data")
    max_steps: int | None = Field(
        None, ge=1, description="optimiser steps; overrides epochs when set"
    )
    lr: Number = Field(2e-5, gt=0, description="peak learning rate of AdamW, cosine to 0")
    warmup_ratio: Number = Field(
        0.03, ge=0, lt=1, description="share of the steps with linear warmup"
    )
    weight_decay: Number = Field(0.0, ge=0, description="AdamW's, decoupled")
    max_grad_norm: Number = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    seed: int = Field(42, ge=0, description="of the data order, plain lora's factors and dropout")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="recompute activations: less memory, a third more time; auto is true on GPUs, false on CPUs",
    )
    compile: bool = Field(
        False, description="compile the model's layers (torch.compile); not with zero3"
    )
    liger: bool = Field(
        False,
        description="Liger's kernels for norms, rotary embeddings and MLPs; a GPU, liger-kernel",
    )
    checkpoint_every: int = Field(
        100, ge=1, description="optimiser steps between checkpoints; start and end have one"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints that stay in the run folder")


class Eval(Section):
    suites: list[Literal[*TASKS, *GROUPS]] = Field(
        [], description="benchmarks to score after training"
    )
    data_dir: str | None = Field(
        None, description="folder with the benchmarks' files; the hub when null"
    )
    limit: int | None = Field(
        None, ge=1, description="problems of each suite, the first so many; all when null"
    )
    other_text: Name | None = Field(
        None,
        description="JSONL file with a field text, or .txt, outside the task: what of it is forgotten is measured",
    )
    prompt: Literal["recipe", "literature"] = Field(
        "recipe",
        description="the training prompt, or each benchmark's published one with its stop strings",
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens generated at most for one problem; each benchmark's published number when null",
    )
    batch_size: int = Field(16, ge=1, description="problems generated at once on a rank")
    samples: int = Field(
        1, ge=1, description="responses to each problem; above 1 with a temperature, for pass@k"
    )
    temperature: Number = Field(0.0, ge=0, description="0 is greedy")
    seed: int = Field(
        0, ge=0, description="of samples, with the problem's name and the sample's number"
    )
    timeout: Number = Field(
        10.0, gt=0, description="seconds that a generated program may take with its tests"
    )
    allow_unsandboxed: bool = Field(
        False, description="run generated programs even where nothing can box them in"
    )
    baseline: bool = Field(False, description="also score the base model before training")

    @model_validator(mode="after")
    def _samples_differ(self) -> "Eval":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "samples: above 1 they need a temperature above 0, or all are the same"
            )
        return self


class Recipe(Section):
    """Everything that decides a run."""

    model: Model
    data: Data
    adapter: Adapter = Adapter()
    calibration: Calibration = Calibration()
    train: Train = Train()
    eval: Eval = Eval()
    engine: Literal["zero3", "zero3_offload", "fsdp", "zero2", "single"] = Field(
        "zero3",
        description="zero3 and fsdp shard everything; zero3_offload also keeps the shards in the CPUs' memory; "
        "zero2 keeps the base whole on each rank; single is one process",
    )
    tracking: list[Literal["tensorboard", "wandb"]] = Field(
        [],
        description="where metrics also go; each a package to install (wandb offline without network)",
    )

    @model_validator(mode="after")
    def _compiled_layers_are_not_gathered(self) -> "Recipe":
        if self.train.compile and self.engine.startswith("zero3"):
            raise ValueError(
                "train.compile: zero3 gathers weights inside the layers; set engine=fsdp, zero2 or single"
            )
        return self

    @model_validator(mode="after")
    def _calibration_fits_the_method(self) -> "Recipe":
        method, of = self.adapter.method, self.calibration
        if method != "astra" and (of.statistics != "exact" or of.split_half):
            field = "split_half" if of.split_half else "statistics"
            raise ValueError(
                f"calibration.{field}: {method} has no use for it, only astra; leave it out"
            )
        if of.statistics == "reference" and of.batch_size != 1:
            raise ValueError(
                "calibration.batch_size: the reference statistics take one row at a time; set it to 1"
            )
        return self


def read(source: str, overrides: list[str]) -> Recipe:
    """The recipe named `source` (a file in recipes/, or a path), with `a.b=value` overrides (YAML values) applied.

    Raises:
        UserError: unknown recipe or key, bad value, unreadable file; one line that names it.
    """
    values = load(find(source, RECIPES, "--recipe"), "--recipe")
    for override in overrides:
        _override(values, override)
    return validate(values)


def validate(values: dict) -> Recipe:
    """The recipe of nested `values`; see `read` for errors."""
    return section(Recipe, **values)


def section(kind: type[SectionT], **values: Any) -> SectionT:
    """One section of given values, for commands that have no recipe; see `read` for errors."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, kind)) from None


def to_yaml(recipe: Recipe) -> str:
    """Every field, resolved; `read` takes it back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def difference(old: Recipe, new: Recipe, ignore: tuple[str, ...] = ()) -> str | None:
    """The first field whose values differ, as `section.field (old, now new)`; None if there is none."""

    def flat(recipe: Recipe) -> dict[str, Any]:
        values = {}
        for name, value in recipe.model_dump().items():
            values |= (
                {f"{name}.{key}": v for key, v in value.items()}
                if isinstance(value, dict)
                else {name: value}
            )
        return values

    before, after = flat(old), flat(new)
    for name, value in after.items():
        if before[name] != value and name not in ignore and name.split(".")[0] not in ignore:
            return f"{name} ({_yaml(before[name])}, now {_yaml(value)})"
    return None


def field_help() -> str:
    """One line for each field: name, default and description."""
    specs = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            specs |= {f"{name}.{key}": spec for key, spec in field.annotation.model_fields.items()}
        else:
            specs[name] = field
    lines = []
    for name, spec in specs.items():
        default = "required" if spec.is_required() else f"default {_yaml(spec.default)}"
        lines.append(f"  {name:<30} {spec.description} ({default})")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    """`value` as --set takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def find(source: str, folder: Path, option: str) -> Path:
    """The YAML file called `source` in `folder`, or at that path. Raises UserError naming `option`."""
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if source in names:
        return folder / f"{source}.yaml"
    path = Path(source).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(source, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{option}: no {option.strip('-')} or file {source!r}; {hint}there are: {', '.join(names)}"
    )


def load(path: Path, option: str) -> dict:
    """The fields of a YAML file. Raises UserError naming `option`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{option}: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{option}: {path} holds no fields; start from a file in {RECIPES.name}/")
    return values


def _override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set: {override!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set: the value of {override!r} is not YAML; quote it") from None
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"--set: {key}: {parent} has no fields of its own")
    values[last] = value


def _explain(error: ValidationError, kind: type[Section]) -> str:
    """The first problem in one line: an unknown key before anything that it may have caused."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem, more = problems[0], len(problems) - 1
    where = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            text = f"{where}: unknown key; {_nearest(problem['loc'], kind)}"
        case "missing":
            text = f"{where}: is required; set it in the recipe or with --set {where}=VALUE"
        case "value_error" if isinstance(
            problem["input"], dict
        ):  # of a section: its message names the field
            text = f"{where}{'.' if where else ''}{problem['ctx']['error']}"
        case _:
            text = f"{where}: {problem['input']!r} is not valid: {problem['msg']}"
    return text + (f" (and {more} more)" if more else "")


def _nearest(location: tuple, kind: type[Section]) -> str:
    for part in location[:-1]:  # names of fields, keys of mappings, indices of lists
        if part in kind.model_fields:
            kind = _section_in(kind.model_fields[part].annotation) or kind
    known = list(kind.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return (
        f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?"
        if near
        else f"known: {', '.join(known)}"
    )


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds: itself, or in a mapping, a list or a choice with None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
