"""From pydantic's findings to one message that a user can act on.

pydantic lists every problem of a recipe at once, but speaks of Python types and of the branches of unions. Here
each problem becomes one line: the dotted key and value as written in the file, what is allowed there, and the
nearest key where the key is unknown.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from tessera.recipe import toml_writer
from tessera.recipe.section import Inconsistent
from tessera.recipe.vocabulary import describe, dotted, find, keys, nearest, subtable

_LONGEST_VALUE = 60


def explain(error: ValidationError, root: type[BaseModel], raw: Mapping[str, Any]) -> list[str]:
    """One line for every problem of the table `raw`, which was validated against `root`."""
    lines: list[tuple[tuple[str | int, ...], str]] = []
    for finding in error.errors():
        path, value = _path(finding["loc"], root, raw), finding["input"]
        cause = finding.get("ctx", {}).get("error")
        if isinstance(cause, Inconsistent):
            for key, text in cause.problems:
                inner = (*path, *key.split("."))
                lines.append((inner, f"{dotted(inner)}: {text}"))
        elif finding["type"] == "missing":
            lines.append((path, f"{dotted(path)} is missing: {_allowed(root, path)}"))
        elif finding["type"] == "extra_forbidden":
            lines.append((path, _unknown(root, path, value)))
        elif finding["type"] == "value_error":
            lines.append((path, f"{dotted(path)} = {_shown(value)}: {cause}"))
        else:
            rule = f"must be {_allowed(root, path)}" + _close(root, path, value)
            lines.append((path, f"{dotted(path)} = {_shown(value)}: {rule}"))
    # A union reports each of its branches: the finding that looks deepest into the value is the one to read, and
    # where they look equally deep they say the same.
    paths = {path for path, _ in lines}
    deepest = [line for path, line in lines if not any(_inside(other, path) for other in paths)]
    return list(dict.fromkeys(deepest))


def _inside(path: Sequence[str | int], outer: Sequence[str | int]) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _path(location: Sequence[str | int], root: type[BaseModel], raw: Any) -> tuple[str | int, ...]:
    """pydantic's location without the names of union branches, which are no keys of the file."""
    path: list[str | int] = []
    for part in location:
        if isinstance(raw, Mapping):
            if part not in raw and find(root, [*path, part]) is None:
                continue
            path.append(part)
            raw = raw.get(part)
        elif isinstance(part, int) and isinstance(raw, Sequence):
            path.append(part)
            raw = raw[part]
    return tuple(path)


def _allowed(root: type[BaseModel], path: Sequence[str | int]) -> str:
    field = find(root, path)
    if field is None:
        return "left out"
    if isinstance(path[-1], int):  # one member of a list
        return "table" if subtable(field) else "string"
    return describe(field)


def _unknown(root: type[BaseModel], path: Sequence[str | int], value: Any) -> str:
    section = isinstance(value, Mapping)
    said = f"[{dotted(path)}]: unknown section" if section else f"{dotted(path)} = {_shown(value)}: unknown key"
    if suggestion := nearest(root, path):
        meant = find(root, suggestion.split("."))
        is_section = section and meant is not None and subtable(meant)
        return f"{said}; did you mean {f'[{suggestion}]' if is_section else suggestion}?"
    field = find(root, path[:-1]) if len(path) > 1 else None
    table = subtable(field) if field else root
    return f"{said}; allowed here: {', '.join(keys(table or root))}"


def _close(root: type[BaseModel], path: Sequence[str | int], value: Any) -> str:
    """The allowed word that a misspelt one resembles."""
    field = find(root, path)
    words = [word for word in describe(field).split('"')[1::2]] if field else []
    matches = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return f'; did you mean "{matches[0]}"?' if matches else ""


def _shown(value: Any) -> str:
    try:
        text = toml_writer.value(value)
    except (TypeError, ValueError):  # dates, NaN and infinity: TOML reads them, a recipe has no use for them
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 4] + " ..."
