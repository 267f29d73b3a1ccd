"""The folder of one run, and where everything in it lies:

    recipe.toml         the resolved recipe: every key, so that a new default cannot change a run
    run.json            {schema, state, pid, step, time, ...}: how the run stands
    events.jsonl        everything it measured, see `events`
    checkpoints/step-N/ complete checkpoints, each with a manifest; step-N.partial is still being written, or going
    report.html         the page made from the events

Other files may lie beside these; nobody here minds them.

A checkpoint that is written again must not go before the other one is there. It is published as step-N.new, which
readers take before step-N; then the old one goes to step-N.old.partial, and the new one to step-N (`settle`). A
machine that dies at any moment leaves a complete checkpoint of the step.
"""

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, get_args

from tessera.recipe import Recipe, UserError, load_recipe
from tessera.store.files import Unwritable, sync_folder, unreadable, unwritable, write_atomic
from tessera.store.json_text import check_schema, read_object, write_json
from tessera.store.manifest import MANIFEST, PARTIAL

State = Literal["running", "finished", "interrupted", "failed"]

NEW = ".new"  # ends the name of a complete checkpoint that is about to replace another one of its step

_SCHEMA = 1
_CHECKPOINT = re.compile(rf"step-([0-9]+)({re.escape(NEW)})?")
_LEFTOVER = re.compile(r"step-[0-9]+[.a-z]*\.partial")  # of checkpoints that a killed process wrote or removed
_LEFTOVER_FILE = re.compile(r"\.[0-9a-f]{16}\.partial")  # of `write_atomic`


def discard(path: Path) -> None:
    """Remove a checkpoint; a crash on the way leaves a ".partial" folder, never a checkpoint with files missing."""
    doomed = path.with_name(f"{path.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        os.rename(path, doomed)
    except OSError as error:
        raise Unwritable(f"{path}: cannot be removed: {error.strerror}") from None
    shutil.rmtree(doomed, ignore_errors=True)


class RunFolder:
    """The files of a run; made by `create` for a new run, by `open` for one that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_path = path / "recipe.toml"
        self.events_path = path / "events.jsonl"
        self.report_path = path / "report.html"
        self.checkpoints_path = path / "checkpoints"
        self._state_path = path / "run.json"

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> Self:
        """Make the folder of a new run, with its parents; its state is "running" at step 0.

        Raises UserError if the folder holds anything already or cannot be written.
        """
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
        except FileExistsError:
            raise UserError(f"{path}: is a file; choose a folder with --out") from None
        except OSError as error:
            raise unwritable(path, error) from error
        if occupied:
            raise UserError(f"{path}: {run._occupied()}")
        try:
            run._fill(recipe)
        except BaseException:  # a full disk: the same command must work once there is room
            with suppress(OSError):
                run._state_path.unlink(missing_ok=True)
                run.recipe_path.unlink(missing_ok=True)
                run.checkpoints_path.rmdir()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run in a folder; raises UserError if there is none."""
        run = cls(path)
        try:
            names = {member.name for member in path.iterdir()}
        except FileNotFoundError:
            raise UserError(f"{path}: no such folder; give the folder of a run, such as runs/tiny") from None
        except OSError as error:
            raise unreadable(path, error) from error
        if {run.recipe_path.name, run._state_path.name} <= names:
            return run
        if "arms" in names:
            arm = path / "arms" / "fp8"
            raise UserError(f"{path}: is a comparison of runs; name one of them, such as {arm}")
        raise UserError(
            f"{path}: is not the folder of a run, which has {run.recipe_path.name} and {run._state_path.name}"
        )

    def recipe(self) -> Recipe:
        """The recipe of the run as it was resolved at its start; raises UserError if it does not load."""
        return load_recipe(self.recipe_path)

    def state(self) -> dict[str, Any]:
        """How the run stands: {schema, state, pid, step, time, ...}, as `set_state` wrote it last.

        A run that was killed still says "running". Raises UserError if the file is damaged or newer.
        """
        facts = read_object(self._state_path)
        check_schema(self._state_path, facts.get("schema"), _SCHEMA)
        return facts

    def set_state(self, state: State, step: int, **facts: Any) -> None:
        """Write how the run stands, with the id of this process; facts of earlier calls are not kept."""
        if state not in get_args(State):
            raise ValueError(f"state {state!r}: must be one of {', '.join(get_args(State))}")
        head = {
            "schema": _SCHEMA,
            "state": state,
            "pid": os.getpid(),
            "step": step,
            "time": round(time.time(), 3),
        }
        write_json(self._state_path, head | facts)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies once it is complete."""
        return self.checkpoints_path / f"step-{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The complete checkpoints as (step, folder), the earliest step first; of two of a step the newer one."""
        found: dict[int, Path] = {}
        try:
            for path in self.checkpoints_path.iterdir():
                match = _CHECKPOINT.fullmatch(path.name)
                if match and (path / MANIFEST).is_file() and (match[2] or int(match[1]) not in found):
                    found[int(match[1])] = path
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unreadable(self.checkpoints_path, error) from error
        return sorted(found.items())

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The complete checkpoint of the latest step, or None."""
        return max(self.checkpoints(), default=None)

    def settle(self) -> None:
        """Give checkpoints that replace others their names, and remove what killed processes left half done.

        Only for the writer of the run. Raises UserError where the disk refuses; all is as good as before then.
        """
        self.settle_names()
        try:
            for path in self.checkpoints_path.glob(f"*{PARTIAL}"):
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            for path in self.path.glob(f".*{PARTIAL}"):
                if _LEFTOVER_FILE.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.checkpoints_path, error) from error

    def settle_names(self) -> None:
        """The first half of `settle`; for one who has just published a checkpoint that replaces another."""
        for _, path in self.checkpoints():
            if path.name.endswith(NEW):
                target = path.with_name(path.name.removesuffix(NEW))
                if target.exists():
                    discard(target)
                try:
                    os.rename(path, target)
                    sync_folder(target.parent)
                except OSError as error:
                    raise unwritable(path, error) from error

    def _fill(self, recipe: Recipe) -> None:
        write_atomic(self.recipe_path, recipe.to_toml())
        try:
            self.checkpoints_path.mkdir()
        except OSError as error:
            raise unwritable(self.checkpoints_path, error) from error
        self.set_state("running", 0)  # last: its file is what makes the folder a run

    def _occupied(self) -> str:
        if self._state_path.is_file():
            return (
                f"holds a run already; go on with it by `tessera train --resume {self.path}`, or choose another "
                "folder with --out"
            )
        return "is not empty; choose another folder with --out"
