"""Write docs/recipe.md from the sections themselves:  python -m tessera.recipe.document > docs/recipe.md"""

from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tessera.recipe import toml_writer
from tessera.recipe.model import RopeScaling
from tessera.recipe.recipe import Recipe
from tessera.recipe.schedule import Schedule, Segment
from tessera.recipe.section import Section
from tessera.recipe.vocabulary import describe, keys, subtable

_HEAD = """\
# The recipe

A recipe is one TOML file that describes a run; `recipes/` has ready ones. This page lists every key, what it may
hold, its default and its meaning. It is written by `python -m tessera.recipe.document`.

- Unknown keys, missing keys and values of another type are errors, listed all at once with the nearest key.
  An integer is accepted where a number is wanted.
- `--set section.key=value` on the command line overrides one key; it may be given more than once.
- The resolved recipe, with every key written out, is kept as `recipe.toml` in the folder of the run.
"""

_SCHEDULE = """\
## Schedules

A schedule is a number, or a list of segments that follow each other; after the last one its `to` holds.

```toml
learning_rate = [
  { shape = "linear", steps = 2000, from = 0.0, to = 2.2e-4 },
  { shape = "constant", steps = 10000, to = 2.2e-4 },
  { shape = "cosine", steps = 5000, to = 2.2e-5 },
]
```

In step i (counted from 0) of a segment of N steps from a to b, the value is

- constant: b
- linear: a + (b - a) i / N
- cosine: b + (a - b) (1 + cos(pi i / N)) / 2

so the first step has `from` exactly, and `to` is reached in the step after the last one.
"""


def document() -> str:
    """The whole page in Markdown."""
    parts = [_HEAD, "## Top level\n\n" + _table(Recipe, sections=False)]
    for name, field in keys(Recipe).items():
        if section := subtable(field):
            parts.append(f"## [{name}]\n\n{_first_line(section)}\n\n{_table(section)}")
            if section is not None and RopeScaling in map(subtable, keys(section).values()):
                parts.append(f"### [{name}.rope_scaling]\n\n{_first_line(RopeScaling)}\n\n{_table(RopeScaling)}")
    parts.append(f"{_SCHEDULE}\n{_table(Segment)}")
    return "\n".join(parts)


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _table(section: type[BaseModel], sections: bool = True) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *_rows(section, sections)]
    return "\n".join(rows) + "\n"


def _rows(section: type[BaseModel], sections: bool) -> Iterator[str]:
    for name, field in keys(section).items():
        if not sections and subtable(field):
            continue
        cells = (f"`{name}`", describe(field), _default(name, field), field.description or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(name: str, field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "the file's name" if name == "name" else "required"
    if value is None:
        return ""
    if isinstance(value, Schedule):
        value = value.model_dump(by_alias=True, exclude_none=True)
    if isinstance(value, Section):
        value = value.model_dump(by_alias=True, exclude_none=True)
    return f"`{toml_writer.value(value)}`"


if __name__ == "__main__":
    print(document(), end="")
