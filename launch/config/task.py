"""The section `task`: text generation, or one of a few labels, or one number, for each row."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from launch.config.section import Name, Section


def _read_labels(value: object) -> object:
    """Read labels that YAML takes for whole numbers, such as [0, 1], as their texts."""
    if not isinstance(value, list):
        return value
    return [
        str(label) if isinstance(label, int) and not isinstance(label, bool) else label
        for label in value
    ]


class Task(Section):
    """What is learnt from a row, and the development rows by which that is scored."""

    kind: Literal["causal", "classification", "regression"] = Field(
        "causal",
        description="what is learnt: the answer's tokens, one of `labels`, or a number; the last "
        "two put a new head on the base",
    )
    name: Name | None = Field(
        None, description="name of the scores in results.json, and of their metric; null: the kind"
    )
    labels: Annotated[list[Name], BeforeValidator(_read_labels)] = Field(
        [],
        description="labels of a classification, in the order of the head's outputs: texts, or whole "
        "numbers",
    )
    sentence1: Name | None = Field(None, description="field of a row that holds the text")
    sentence2: Name | None = Field(
        None, description="field with the second text of a pair; null: rows have one text"
    )
    label: Name = Field(
        "label",
        description="field with the label: its text, or its place in `labels` from 0; or a number",
    )
    dev: dict[Name, Name] | Name | None = Field(
        None,
        description="development rows, scored after every epoch: a split of data.path, a file, or a "
        "folder with a / in its path; or several, {name of the score: one of these}",
    )

    @property
    def has_head(self) -> bool:
        """Whether a new head takes the place of the base's output head."""
        return self.kind != "causal"

    @property
    def dev_sets(self) -> dict[str, str]:
        """Name of a score -> the split or file of its rows."""
        if self.dev is None:
            return {}
        return self.dev if isinstance(self.dev, dict) else {self.name or self.kind: self.dev}

    @model_validator(mode="after")
    def _check_fields(self) -> "Task":
        if self.kind == "causal":
            for name in type(self).model_fields:
                if not self.is_default(name):
                    raise ValueError(
                        f"{name}: is for rows with labels; set task.kind to classification or "
                        "regression, or leave it out"
                    )
            return self
        if self.sentence1 is None:
            raise ValueError(f"sentence1: {self.kind} needs the field that holds the text; set it")
        if self.kind == "regression" and self.labels:
            raise ValueError("labels: a regression's labels are numbers; leave it out")
        if self.kind == "classification":
            self._check_labels()
        return self

    def _check_labels(self) -> None:
        if len(self.labels) < 2:
            raise ValueError(
                "labels: a classification needs at least two, such as [bad, good]; set it"
            )
        doubled = [label for label in self.labels if self.labels.count(label) > 1]
        if doubled:
            raise ValueError(f"labels: {doubled[0]!r} is there twice; leave one out")
