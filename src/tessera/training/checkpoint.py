"""A checkpoint: everything that the next step depends on, in a folder that is complete or absent.

    checkpoints/step-N/
      model.safetensors       FP32 masters and routing biases
      optimizer.safetensors   both moments
      ema.safetensors         where the recipe keeps averages: they, and the routing biases again
      state.json              step, data position, tokens, length of the event file
      recipe.toml             the resolved recipe
      tokenizer.json          the tokenizer, so that the folder can be used alone
      manifest.json           bytes and SHA-256 of the others; written last

Nothing is unpickled: safetensors and JSON only. What is not here is derived: schedules from the step, FP8 weight
codes from the masters, the order of the data from its position.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tessera.model.weights import read_tensors, weights, write_tensors
from tessera.recipe import UserError
from tessera.store import RunFolder, publish_folder, verify_manifest, write_atomic, write_json
from tessera.store.checkpoint_path import EMA
from tessera.training.ema import Ema
from tessera.training.optimizer import AdamW

SCHEMA = 1


def save(
    run: RunFolder,
    step: int,
    model: nn.Module,
    optimizer: AdamW,
    ema: Ema | None,
    tokenizer: str,
    facts: Mapping[str, Any],
) -> Path:
    """Write checkpoints/step-N of the run; returns its path.

    `tokenizer` is the text of tokenizer.json, `facts` are the trainer's numbers. Raises UserError where the disk
    refuses; earlier checkpoints are untouched then, and nothing of this one is left to fill the disk.
    """
    target = run.checkpoint_path(step)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, run, step, model, optimizer, ema, tokenizer, facts)
        _remove(target)  # a run resumed from an earlier checkpoint writes its later ones again
        publish_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _write(
    partial: Path,
    run: RunFolder,
    step: int,
    model: nn.Module,
    optimizer: AdamW,
    ema: Ema | None,
    tokenizer: str,
    facts: Mapping[str, Any],
) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made: {error.strerror}") from None
    write_tensors(partial / "model.safetensors", weights(model))
    write_tensors(partial / "optimizer.safetensors", optimizer.tensors())
    if ema:
        write_tensors(partial / EMA, ema.tensors())
    state = {"schema": SCHEMA, "step": step, "optimizer_steps": optimizer.steps, **facts}
    write_json(partial / "state.json", state)
    write_atomic(partial / "recipe.toml", run.recipe().to_toml())
    write_atomic(partial / "tokenizer.json", tokenizer)


def prune(run: RunFolder, keep: int, milestones: Collection[int]) -> None:
    """Remove all complete checkpoints but the latest `keep` and those at `milestones`."""
    removable = [path for step, path in run.checkpoints() if step not in milestones]
    for path in removable[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a crash on the way leaves a ".partial" folder, never a checkpoint with files missing."""
    if path.exists():
        doomed = path.with_name(path.name + ".old.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            path.rename(doomed)
        except OSError as error:
            raise UserError(f"{path}: cannot be removed: {error.strerror}") from None
        shutil.rmtree(doomed, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, after all its files have been checked against the manifest; raises UserError."""
    verify_manifest(path)
    state = json.loads((path / "state.json").read_text())
    if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
        raise UserError(f"{path / 'state.json'}: not the state of a checkpoint")
    if state["schema"] > SCHEMA:
        raise UserError(
            f"{path}: written by a newer tessera (schema {state['schema']}, this one reads {SCHEMA}); upgrade tessera"
        )
    return state


def read_ema(path: Path, ema: Ema) -> None:
    """Copy a checkpoint's averages into `ema`; raises UserError where it has none."""
    read_tensors(path / EMA, ema.tensors())


def read_optimizer(path: Path, optimizer: AdamW, steps: int) -> None:
    """Copy a checkpoint's moments into `optimizer`."""
    read_tensors(path / "optimizer.safetensors", optimizer.tensors())
    optimizer.steps = steps
