"""A person may name a checkpoint by itself, by its run or by a comparison."""

from pathlib import Path

import pytest

from tessera.recipe import UserError
from tessera.store import RunFolder, find_checkpoint, write_manifest
from tessera.store.checkpoint_path import TENSORS

from .test_run_folder import RECIPE


def run_with_checkpoints(path: Path, *steps: int) -> RunFolder:
    run = RunFolder.create(path, RECIPE)
    for step in steps:
        folder = run.checkpoint_path(step)
        (folder / "model").mkdir(parents=True)
        (folder / "model" / TENSORS).write_bytes(b"x")
        write_manifest(folder)
    return run


def test_a_checkpoint_a_run_and_a_comparison_all_lead_to_a_checkpoint(tmp_path: Path) -> None:
    run = run_with_checkpoints(tmp_path / "arms" / "fp8", 5, 10)
    assert find_checkpoint(run.checkpoint_path(5)) == run.checkpoint_path(5)
    assert find_checkpoint(run.path) == run.checkpoint_path(10)
    assert find_checkpoint(tmp_path) == run.checkpoint_path(10)


def test_where_no_checkpoint_is_that_is_said(tmp_path: Path) -> None:
    run = run_with_checkpoints(tmp_path / "tiny")
    with pytest.raises(UserError, match="tiny: the run has no checkpoint yet"):
        find_checkpoint(run.path)
    for place in (tmp_path, tmp_path / "absent", run.checkpoints_path):
        with pytest.raises(UserError, match="no checkpoint, run or comparison; give a run such as"):
            find_checkpoint(place)
