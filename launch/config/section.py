"""What every section of a recipe is made of."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints

Name = Annotated[str, StringConstraints(min_length=1)]


class Section(BaseModel):
    """A part of a recipe. Strict: 3 is not "3", and true is not 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    def is_default(self, name: str) -> bool:
        """Return whether a field has its default."""
        return getattr(self, name) == type(self).model_fields[name].default


SectionT = TypeVar("SectionT", bound=Section)
