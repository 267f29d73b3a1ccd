"""Read a recipe file, apply `--set section.key=value`, and report everything wrong with it at once."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tessera.recipe.errors import UserError
from tessera.recipe.problems import explain
from tessera.recipe.recipe import SCHEMA, Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with overrides such as "optimizer.learning_rate=1e-3" put over it in order.

    The value of an override is TOML; what is not TOML is taken as a string, so `data.source=notes.txt` needs
    no quotes. The name defaults to the file's. Raises UserError, listing every problem, one a line.
    """
    path = Path(path)
    raw = _read(path)
    for override in overrides:
        _apply(raw, override)
    raw.setdefault("name", path.stem)
    schema = raw.get("schema", SCHEMA)
    if type(schema) is int and schema > SCHEMA:
        raise UserError(
            f"{path}: schema = {schema}: this tessera reads recipes up to schema {SCHEMA}; upgrade tessera "
            "or rewrite the recipe in the older form"
        )
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = explain(error, Recipe, raw)
    problems = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    given = f" with --set {' --set '.join(overrides)}" if overrides else ""
    raise UserError("\n  ".join([f"{path}{given}: {problems}", *lines]))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file{_neighbour(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8, and TOML files are") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid TOML: nested too deeply") from None


def _neighbour(path: Path) -> str:
    recipes = [other.name for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.with_suffix(".toml").name, recipes, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise UserError(f"--set {override}: must be section.key=value, such as optimizer.learning_rate=1e-3")
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {part} is a value, not a section; set it as a whole")
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # how Python hands on such a command line
        raise UserError(f"--set {override!a}: is not UTF-8, and TOML, in which it is kept, is nothing else")
    table[parts[-1]] = _value(text.strip(), override)


def _value(text: str, override: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text.startswith(("[", "{", '"', "'")):  # meant as TOML: as a string it would only fail later
            raise UserError(f"--set {override}: the value is not valid TOML: {error}") from None
        return text
    # A line break in the text could smuggle in further keys.
    return parsed["value"] if len(parsed) == 1 else text
