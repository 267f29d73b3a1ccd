"""A checkpoint: everything that the next step depends on, in a folder that is complete or absent.

    checkpoints/step-N/
      model/          FP32 masters and routing biases
      optimizer/      both moments
      ema/            where the recipe keeps averages: they, and the routing biases again
      state.json      step, data position, tokens, random streams, stability's numbers, length of the event file
      recipe.toml     the resolved recipe
      tokenizer.json  the tokenizer, so that the folder can be used alone
      manifest.json   bytes and SHA-256 of the others; written last

Nothing is unpickled: safetensors and JSON only. What is not here is derived: schedules from the step, FP8 weight
codes from the masters, the order of the data from its position.
"""

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from tessera.model.tensor_folder import check_tensors, read_tensors, write_tensors
from tessera.recipe import UserError
from tessera.recipe.checkpoint import CheckpointSection
from tessera.store import RunFolder, publish_folder, verify_checkpoint, write_atomic, write_json
from tessera.store.checkpoint_path import OPTIMIZER, RECIPE, STATE, TOKENIZER, WEIGHTS, read_state_file
from tessera.store.events import event_before
from tessera.store.files import unwritable
from tessera.store.json_text import check_schema
from tessera.store.manifest import PARTIAL
from tessera.store.run_folder import NEW, discard
from tessera.training.first_rank import on_first_rank

SCHEMA = 1
_STEP = re.compile(r"step-([0-9]+)")

Parts = Mapping[str, Mapping[str, Tensor]]  # the tensors of each folder


def save(
    run: RunFolder,
    step: int,
    parts: Parts,
    state: Mapping[str, Any],
    tokenizer: str,
    group: ProcessGroup | None = None,
) -> Path:
    """Write checkpoints/step-N of the run; returns its path.

    `state` is what state.json says beside schema and step, `tokenizer` the text of tokenizer.json; `group` is that of
    all ranks that call this. Raises UserError where the disk refuses; earlier checkpoints, one of the same step among
    them, are untouched then, and nothing of this one is left to fill the disk.
    """
    target = run.checkpoint_path(step)
    partial = target.with_name(target.name + PARTIAL)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise unwritable(partial, error) from None

    def end() -> None:
        write_json(partial / STATE, {"schema": SCHEMA, "step": step, **state})
        write_atomic(partial / RECIPE, run.recipe().to_toml())
        write_atomic(partial / TOKENIZER, tokenizer)
        if target.exists():  # a run resumed from an earlier checkpoint writes its later ones again
            run.settle_names()
            publish_folder(partial, target.with_name(target.name + NEW))
            run.settle_names()
        else:
            publish_folder(partial, target)

    try:
        on_first_rank(group, begin)
        for name, tensors in parts.items():
            write_tensors(partial / name, tensors, group)
        on_first_rank(group, end)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def prune(run: RunFolder, step: int, section: CheckpointSection, milestones: Collection[int]) -> None:
    """Remove what the recipe does not keep of the checkpoints up to `step`, the latest of this course of the run.

    Later ones are of an earlier course, which a person left for a checkpoint before them. They make room as they are
    written again, and must not count as the latest.
    """
    if not section.keep_latest:
        return
    so_far = [(number, path) for number, path in run.checkpoints() if number <= step]
    for number, path in so_far[: -section.keep_latest]:
        if number not in milestones and not (section.keep_every and number % section.keep_every == 0):
            discard(path)


def read_state(path: Path, parts: Collection[str] = (WEIGHTS, OPTIMIZER)) -> dict[str, Any]:
    """state.json of a checkpoint, after all its files have been checked against the manifest; raises UserError.

    `parts` are the folders of tensors that it must have.
    """
    verify_checkpoint(path, parts)
    state = read_state_file(path)
    if type(state.get("schema")) is int and state["schema"] > SCHEMA:
        raise UserError(
            f"{path}: written by a newer tessera (schema {state['schema']}, this one reads {SCHEMA}); upgrade tessera"
        )
    check_schema(path / STATE, state.get("schema"), SCHEMA)
    named = _STEP.fullmatch(path.name.removesuffix(NEW))
    if number(path, state, "step") != int(named[1] if named else state["step"]):
        raise UserError(f"{path / STATE}: is that of step {state['step']}; put the files of one step together")
    return state


def number(path: Path, state: Mapping[str, Any], name: str) -> int:
    """A count in the state of the checkpoint `path`; raises UserError for anything else."""
    value = state.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(f"{path / STATE}: {name} must be a whole number of 63 bits; the checkpoint is damaged")
    return value


def seconds(path: Path, state: Mapping[str, Any]) -> float:
    """The seconds of training in the state of the checkpoint `path`; raises UserError for no such number."""
    value = state.get("seconds")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**63:
        raise UserError(f"{path / STATE}: seconds must be a number >= 0; the checkpoint is damaged")
    return float(value)


def read_parts(path: Path, parts: Parts) -> None:
    """Copy all tensors of a verified checkpoint; all folders are looked through before the first value is copied."""
    for read in (check_tensors, read_tensors):
        for name, targets in parts.items():
            read(path / name, targets)


def latest_to_resume(run: RunFolder) -> Path | None:
    """The latest checkpoint that the run's events lead to, or None where there is no checkpoint.

    A run that was taken back to an earlier checkpoint still has the later ones until it writes them again. Its events
    were cut, so that it could not go on from those. Where the events lead to no checkpoint it is the latest one, and
    what is wrong is said on resuming.
    """
    checkpoints = run.checkpoints()
    for step, path in reversed(checkpoints):
        try:
            offset = number(path, read_state_file(path), "event_offset")
        except UserError:  # damaged: to pass over it would lose steps without a word
            return path
        event = event_before(run.events_path, offset)
        if event and (event.get("kind"), event.get("step")) == ("checkpoint", step):
            return path
    return checkpoints[-1][1] if checkpoints else None
