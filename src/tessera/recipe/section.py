"""What all sections of a recipe have in common: frozen, strict, closed, and checked as a whole.

A section is a pydantic model. Its fields carry their own type, range and one line of documentation; checks
that need more than one field are written in `problems`, which yields all of them instead of stopping at the
first, so that a user repairs a recipe in one round. The message for the user is made in `problems.py`.
"""

from collections.abc import Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Inconsistent(ValueError):
    """Fields that are right one by one but not together: pairs of (dotted key, what is wrong)."""

    def __init__(self, problems: tuple[tuple[str, str], ...]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in problems))
        self.problems = problems


class Section(BaseModel):
    """A frozen table of a recipe: unknown keys and values of another type are errors.

    An integer is accepted where a number is wanted, nothing else is converted. NaN and infinity, which TOML
    can write, are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, what is wrong and what would be right) for rules between several fields."""
        yield from ()

    @model_validator(mode="after")
    def _raise_problems(self) -> Self:
        if problems := tuple(self.problems()):
            raise Inconsistent(problems)
        return self
