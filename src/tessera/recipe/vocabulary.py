"""What can be said in a recipe: the keys of every table, and what each of them may hold, in words.

The words come from the type and range that a field declares, so the error messages and docs/recipe.md cannot
disagree with the check itself. Keys are written as in TOML: `from`, not `start`.
"""

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tessera.recipe import toml_writer
from tessera.recipe.schedule import Schedule, Segment
from tessera.recipe.section import Section

Path = Sequence[str | int]

_NAMES = {bool: "true or false", int: "integer", float: "number", str: "string", types.NoneType: "left out"}
_FORMER = {  # what recipes may still say, and what it is called now
    "training.checkpoint_interval": "checkpoint.interval",
    "training.keep_checkpoints": "checkpoint.keep_latest",
}


def keys(table: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of a table as TOML has them, in the order in which they are declared."""
    return {field.alias or name: field for name, field in table.model_fields.items()}


def subtable(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or holds a list of; None for a plain value."""
    for kind in _alternatives(field.annotation):
        if kind is Schedule:
            return Segment
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def find(root: type[BaseModel], path: Path) -> FieldInfo | None:
    """The field at a path such as ("optimizer", "learning_rate", 1, "steps"); None where there is none."""
    table: type[BaseModel] | None = root
    field = None
    for part in path:
        if isinstance(part, int):
            continue
        field = keys(table).get(part) if table else None
        if field is None:
            return None
        table = subtable(field)
    return field


def describe(field: FieldInfo) -> str:
    """What a field may hold, such as `integer >= 1` or `"fp8", "bf16" or "fp32"`."""
    alternatives = [kind for kind in _alternatives(field.annotation) if kind is not types.NoneType]
    text = " or ".join(_describe_type(kind) for kind in alternatives)
    bounds = [bound for rule in field.metadata if (bound := _describe_bound(rule))]
    return text + " and".join(bounds) + "".join(_describe_rule(rule) for rule in field.metadata)


def nearest(root: type[BaseModel], path: Path) -> str | None:
    """The dotted key that an unknown path most likely means: a sibling if one is close, else any other."""
    parent, unknown = path[:-1], str(path[-1])
    places = {leaf.rsplit(".", 1)[-1]: leaf for leaf in _leaves(root)}
    if (former := dotted(path)) in _FORMER:
        return _FORMER[former]
    if unknown in places:  # the right key in the wrong section
        return places[unknown]
    table: type[BaseModel] | None = root
    if parent:
        field = find(root, parent)
        table = subtable(field) if field else None
    siblings = list(keys(table)) if table else []
    if close := difflib.get_close_matches(unknown, siblings, n=1):
        return dotted([*parent, close[0]])
    if close := difflib.get_close_matches(unknown, list(places), n=1):
        return places[close[0]]
    return None


def dotted(path: Path) -> str:
    """A path as it is written in messages: `optimizer.learning_rate[1].steps`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{toml_writer.key(part)}" if text else toml_writer.key(part)
    return text


def _leaves(table: type[BaseModel]) -> Iterator[str]:
    for name, field in keys(table).items():
        yield name
        inner = subtable(field)
        if inner and inner is not Segment:
            yield from (f"{name}.{leaf}" for leaf in _leaves(inner))


def _alternatives(kind: Any) -> tuple[Any, ...]:
    origin = get_origin(kind)
    if origin is Annotated:
        return _alternatives(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return tuple(inner for part in get_args(kind) for inner in _alternatives(part))
    return (kind,)


def _describe_type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        *head, last = [toml_writer.value(choice) for choice in get_args(kind)]
        return f"{', '.join(head)} or {last}" if head else f"{last} only"
    if get_origin(kind) is tuple:
        return f"list of {_NAMES[get_args(kind)[0]]}s"
    if kind is Schedule:
        return "number >= 0 or list of segments"
    return _NAMES.get(kind, "table")


def _describe_bound(rule: Any) -> str:
    match rule:
        case annotated_types.Ge(ge=bound):
            return f" >= {bound}"
        case annotated_types.Gt(gt=bound):
            return f" > {bound}"
        case annotated_types.Le(le=bound):
            return f" <= {bound}"
        case annotated_types.Lt(lt=bound):
            return f" < {bound}"
    return ""


def _describe_rule(rule: Any) -> str:
    match rule:
        case annotated_types.MultipleOf(multiple_of=factor):
            return f", a multiple of {factor}"
        case annotated_types.MinLen(min_length=length) if length == 1:
            return ", not empty"
    return ""
