"""Where a recipe's rows come from: those to train on, and others to calibrate on."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from launch.config.section import Name, Number, Section

# Data sets that published calibrations use, by short names. wikitext2, nq_open and alpaca are those
# of the loaders of Astra's authors (LyoAI/Astra, dataset/loader.py) and CorDA's (iboing/CorDA,
# cordalib/datautils.py); nq_open is read as CorDA reads it, its questions alone. The others are the
# rows of the recipes of these names.
SHORT_NAMES: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "text": "text"},
    "nq_open": {"path": "google-research-datasets/nq_open", "text": "question"},
    "alpaca": {
        "path": "yahma/alpaca-cleaned",
        "instruction": "instruction",
        "input": "input",
        "answer": "output",
    },
    "metamath": {"path": "meta-math/MetaMathQA", "instruction": "query", "answer": "response"},
    "codefeedback": {
        "path": "m-a-p/CodeFeedback-Filtered-Instruction",
        "instruction": "query",
        "answer": "answer",
        "filter": {"lang": "python"},
    },
    "commonsense": {
        "path": "zwhe99/commonsense_170k",
        "instruction": "instruction",
        "input": "input",
        "answer": "output",
    },
}


def _read_count(value: object) -> object:
    """Read a number of rows: a whole number above 0, `all`, or None for none."""
    if (type(value) is int and value > 0) or value in (None, "all"):
        return value
    # One message; a union of types would give one for each.
    raise PydanticCustomError("count", "Input should be a whole number above 0, or all")


Count = Annotated[int | Literal["all"] | None, PlainValidator(_read_count)]


class RowSource(Section):
    """A data set, and which of its fields and rows are read."""

    path: Name = Field(
        description="hub id, folder in the hub's layout or of save_to_disk, or a JSON, JSONL, CSV "
        "(also .gz) or Parquet file"
    )
    revision: Name = Field("main", description="hub branch, tag or commit of the data")
    config: Name | None = Field(None, description="configuration of a data set that has several")
    split: Name = Field(
        "train", description="split of the data set, or a part of it: train[:1000], train[10%:]"
    )
    instruction: Name = Field("query", description="field of a row that holds the instruction")
    answer: Name = Field("response", description="field of a row that holds the answer")
    input: Name | None = Field(
        None,
        description="field with an instruction's input; rows with one get Alpaca's prompt with "
        "input",
    )
    filter: dict[Name, Name | list[Name]] = Field(
        {},
        description="{field: pattern or list of patterns} that a row must match: {type: [GSM_*, "
        "MATH_*]}",
    )
    limit: int | None = Field(
        None, ge=1, description="number of rows, the first that pass `filter`; all when null"
    )


SENTENCES = ("sentence1", "sentence2")  # fields of CalibrationRows for tasks with a head


class CalibrationRows(RowSource):
    """Rows to calibrate on, in the place of the training rows.

    A short name may stand for the section or for `path`: the fields that it means are then filled
    in. A file or folder of such a name is given as `./name`.
    """

    text: Name | None = Field(
        None,
        description="field of plain text, in the place of instruction and answer: the rows are "
        "joined and cut into blocks of data.max_length tokens",
    )
    sentence1: Name | None = Field(
        None,
        description="field that holds the text, for a task with a head; null: task.sentence1 and "
        "task.sentence2",
    )
    sentence2: Name | None = Field(
        None, description="field with the second text of a pair; null: rows have one text"
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_short_name(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"path": values}
        name = values.get("path") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in SHORT_NAMES:
            return values
        return SHORT_NAMES[name] | {key: value for key, value in values.items() if key != "path"}

    @model_validator(mode="after")
    def _check_sentences(self) -> "CalibrationRows":
        if self.sentence1 is None and self.sentence2 is not None:
            raise ValueError("sentence2: is there without sentence1; set that too")
        if self.sentence1 is not None and self.text is not None:
            raise ValueError("text: there is sentence1 too; leave one out")
        return self

    @model_validator(mode="after")
    def _check_text(self) -> "CalibrationRows":
        if self.text is not None:
            refuse_text_fields(self, "text", "plain text has")
        return self


class MixedRows(RowSource):
    """One of the sets of a mix (data.sources), and how much of it is taken."""

    messages: Name | None = Field(None, description="see Data")
    text: Name | None = Field(
        None,
        description="field of plain text, in the place of instruction and answer: the rows are "
        "joined and cut into blocks of data.max_length tokens, all of which are learnt",
    )
    weight: Number | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="its share of the mix, beside the other sources' weights",
    )
    count: Count = Field(
        None,
        description="rows of it that an epoch trains on, in the place of a weight; all: every row "
        "that is not held out, `repeats` times",
    )
    repeats: int = Field(1, ge=1, description="how often an epoch may use a row, at most")

    @model_validator(mode="after")
    def _check_fields(self) -> "MixedRows":
        if self.weight is None and self.count is None:
            raise ValueError(
                "weight: is required (its share of the mix), or else count (its number of rows, "
                "or all); set one"
            )
        if self.weight is not None and self.count is not None:
            raise ValueError("count: there is a weight too; leave one out")
        if self.messages is not None and self.text is not None:
            raise ValueError("text: rows have messages or plain text; leave one out")
        if self.messages is not None:
            refuse_text_fields(self, "messages", "messages have")
        if self.text is not None:
            refuse_text_fields(self, "text", "plain text has")
        return self


def refuse_text_fields(rows: Section, field: str, what: str) -> None:
    """Raise ValueError if the fields of an instruction and an answer are set beside `field`.

    Args:
        what: the rows that have none, with the verb.
    """
    for name in ("instruction", "answer", "input"):
        if not rows.is_default(name):
            default = type(rows).model_fields[name].default or "null"
            raise ValueError(
                f"{name}: {what} none; leave it out (where it is inherited, set it to {default}), or "
                f"leave {field} out"
            )
