"""What every section of a recipe is made of."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints


def read_number(value: object) -> object:
    """Read text as a number: YAML 1.1 takes 2e-5, without a dot, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Name = Annotated[str, StringConstraints(min_length=1)]
Number = Annotated[float, BeforeValidator(read_number)]


class Section(BaseModel):
    """A part of a recipe. Strict: 3 is not "3", and true is not 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    def is_default(self, name: str) -> bool:
        """Return whether a field has its default."""
        return getattr(self, name) == type(self).model_fields[name].default


SectionT = TypeVar("SectionT", bound=Section)
