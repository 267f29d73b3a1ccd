"""What a folder holds that a report can be made of: one run, or a comparison of several.

A run folder has recipe.toml, run.json and events.jsonl. A comparison folder has recipe.toml, arms/<arm>/ (each a
run folder, once it started) and, when the comparison came to its end, compare.json with the verdict's figures.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.recipe import UserError
from tessera.store import RunFolder, read_events
from tessera.store.json_text import check_schema, read_object
from tessera.training.arms import is_control
from tessera.training.report.history import History, read

COMPARE_SCHEMA = 1
REFERENCE = "bf16"  # the arm that the others are measured against


@dataclass(frozen=True)
class Arm:
    """One run: the name of its arm ("fp8", "control-1"), its state in run.json, and its history."""

    name: str
    state: str
    history: History
    is_control: bool = False


@dataclass(frozen=True)
class Source:
    """Everything a report shows; `comparison` is compare.json, empty for a single run or an unfinished comparison."""

    path: Path
    name: str
    recipe: str  # TOML
    arms: list[Arm]
    is_comparison: bool
    comparison: dict[str, Any] = field(default_factory=dict)


def load(path: Path) -> Source:
    """Read a run folder or a comparison folder; raises UserError if it is neither, or damaged."""
    if (path / "comparison.json").is_file() or (path / "arms").is_dir():
        return _comparison(path)
    run = RunFolder.open(path)
    history = _history(run)
    name = path.resolve().name
    arm = Arm(str((history.start or {}).get("arm") or name), _state(run), history)
    return Source(path, name, _text(run.recipe_path), [arm], False)


def _comparison(path: Path) -> Source:
    compare_path = path / "compare.json"
    comparison: dict[str, Any] = {}
    if compare_path.is_file():
        comparison = read_object(compare_path)
        check_schema(compare_path, comparison.get("schema"), COMPARE_SCHEMA)
    folders = {run.parent.name: run.parent for run in (path / "arms").glob("*/run.json")}
    order = sorted(folders, key=lambda name: _place(name, [str(arm) for arm in comparison.get("arms") or []]))
    name = str(comparison.get("name") or path.resolve().name)
    arms = []
    for arm in order:
        run = RunFolder.open(folders[arm])
        arms.append(Arm(arm, _state(run), _history(run), is_control=is_control(arm)))
    return Source(path, name, _text(path / "recipe.toml"), arms, True, comparison)


def _place(name: str, planned: list[str]) -> tuple[int, int, str]:
    """FP8 first, its twin, the other arms as they were asked for, the controls."""
    rank = 3 if is_control(name) else {"fp8": 0, REFERENCE: 1}.get(name, 2)
    return rank, planned.index(name) if name in planned else len(planned), name


def _history(run: RunFolder) -> History:
    return read(read_events(run.events_path) if run.events_path.exists() else [])


def _state(run: RunFolder) -> str:
    return str(run.state().get("state", "running"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
