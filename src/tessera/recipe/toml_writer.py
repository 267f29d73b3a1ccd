"""Write TOML, which the standard library reads but does not write.

Enough of TOML 1.0 for a resolved recipe, and no more: strings, booleans, integers, finite floats, lists, and
tables. Tables become [sections], tables inside lists become inline tables, one a line. What is written reads
back equal, in value and in type: floats are written with the shortest digits that give the same number.
"""

import json
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dumps(table: Mapping[str, Any]) -> str:
    """The TOML document of a table; raises TypeError or ValueError for what TOML or this writer lacks."""
    return "\n".join(_table(table, ())).lstrip("\n") + "\n"


def value(item: Any) -> str:
    """One value as it stands behind `key = `, on one line."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int):
        return str(item)
    if isinstance(item, float):
        if not isfinite(item):
            raise ValueError(f"{item} is not written: a recipe has finite numbers only")
        return repr(item)
    if isinstance(item, str):
        # JSON's escapes are TOML's, except that TOML wants the delete character escaped too.
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(item, Mapping):
        inside = ", ".join(f"{key(name)} = {value(member)}" for name, member in item.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(item, Sequence):
        return "[" + ", ".join(value(member) for member in item) + "]"
    raise TypeError(f"TOML has no place for {item!r}")


def key(name: str) -> str:
    """A key, quoted where TOML needs it."""
    return name if _BARE_KEY.fullmatch(name) else value(name)


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"\n[{'.'.join(key(name) for name in path)}]"] if path else []
    tables = {name: item for name, item in table.items() if isinstance(item, Mapping)}
    for name, item in table.items():
        if name not in tables:
            lines.append(f"{key(name)} = {_lines(item)}")
    for name, item in tables.items():
        lines.extend(_table(item, (*path, name)))
    return lines


def _lines(item: Any) -> str:
    """Like `value`, but a list of tables takes one line a table."""
    is_list = isinstance(item, Sequence) and not isinstance(item, str)
    if is_list and any(isinstance(member, Mapping) for member in item):
        return "[\n" + "".join(f"  {value(member)},\n" for member in item) + "]"
    return value(item)
