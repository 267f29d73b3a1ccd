"""A run's folder is taken once, found again, and not confused by what else lies in it."""

import errno
import os
from pathlib import Path

import pytest

from tessera.recipe import Recipe, UserError
from tessera.store import EventWriter, RunFolder, write_manifest

RECIPE = Recipe.model_validate(
    {
        "name": "tiny",
        "model": {
            "vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "moe_intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
        },
        "data": {"source": "text", "sequence_length": 16, "batch_size": 2},
        "optimizer": {"learning_rate": [{"shape": "linear", "steps": 3, "to": 0.1}]},
        "training": {"steps": 4},
    }
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "tiny", RECIPE)


def checkpoint(run: RunFolder, name: str, *, complete: bool = True) -> Path:
    path = run.checkpoints_path / name
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"x")
    if complete:
        write_manifest(path)
    return path


def test_a_new_run_is_found_again_with_its_recipe_and_state(run: RunFolder) -> None:
    found = RunFolder.open(run.path)
    assert found.recipe() == RECIPE
    state = found.state()
    assert (state["schema"], state["state"], state["pid"], state["step"]) == (1, "running", os.getpid(), 0)
    assert found.checkpoints() == []
    assert found.latest_checkpoint() is None


def test_the_files_of_a_run_lie_where_its_page_says(run: RunFolder) -> None:
    places = (run.recipe_path, run.events_path, run.report_path, run.checkpoints_path)
    names = ["recipe.toml", "events.jsonl", "report.html", "checkpoints"]
    assert [place.relative_to(run.path).as_posix() for place in places] == names
    EventWriter(run.events_path, "tiny").close()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, RECIPE)
    assert RunFolder.open(tmp_path).recipe() == RECIPE


def test_a_second_run_in_the_same_folder_is_refused_with_both_ways_out(run: RunFolder) -> None:
    run.set_state("interrupted", 3)
    before = sorted(run.path.iterdir())
    with pytest.raises(UserError) as error:
        RunFolder.create(run.path, RECIPE)
    assert f"`tessera train --resume {run.path}`" in str(error.value)
    assert "--out" in str(error.value)
    assert sorted(run.path.iterdir()) == before
    assert run.state()["state"] == "interrupted"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty; choose another folder with --out"):
        RunFolder.create(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_or_of_a_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: is a file; choose a folder"):
        RunFolder.create(tmp_path / "file", RECIPE)
    with pytest.raises(UserError, match="file/run: cannot be written: Not a directory"):
        RunFolder.create(tmp_path / "file" / "run", RECIPE)


@pytest.mark.parametrize("room", range(4))
def test_after_a_full_disk_the_same_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    fsync = os.fsync
    left = iter(range(room))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; free some space"):
            RunFolder.create(tmp_path / "tiny", RECIPE)
    RunFolder.create(tmp_path / "tiny", RECIPE)


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="tiny: cannot be written: Permission denied; choose a folder"):
        RunFolder.create(tmp_path / "tiny", RECIPE)


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such folder; give the folder of a run"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"is not the folder of a run, which has recipe\.toml and run\.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: cannot be read: Not a directory"):
        RunFolder.open(tmp_path / "file")


def test_a_comparison_is_told_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.to_toml())
    RunFolder.create(tmp_path / "arms" / "fp8", RECIPE)
    with pytest.raises(UserError, match=r"is a comparison of runs; name one of them, such as .*arms/fp8"):
        RunFolder.open(tmp_path)
    RunFolder.open(tmp_path / "arms" / "fp8")


def test_the_state_is_what_was_said_last(run: RunFolder) -> None:
    run.set_state("failed", 7, reason="model.layers.1.mlp: not finite", loss=float("nan"))
    state = run.state()
    assert (state["state"], state["step"], state["reason"]) == ("failed", 7, "model.layers.1.mlp: not finite")
    assert state["loss"] is None
    run.set_state("running", 8)
    assert "reason" not in run.state()
    with pytest.raises(ValueError, match="state 'paused': must be one of running, finished"):
        run.set_state("paused", 8)  # type: ignore[arg-type]
    assert run.state()["step"] == 8


def test_a_failed_change_of_state_keeps_the_old_one(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"run\.json: cannot be written: No space left"):
            run.set_state("finished", 4)
    assert run.state()["state"] == "running"
    assert not list(run.path.glob(".*"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid JSON"),
        ("7", "not int"),
        ('{"schema": 9}', "reads up to schema 1"),
        ("{}", "schema = None"),
    ],
)
def test_a_damaged_state_is_named(run: RunFolder, text: str, message: str) -> None:
    (run.path / "run.json").write_text(text)
    with pytest.raises(UserError, match=rf"run\.json: .*{message}"):
        run.state()


def test_checkpoints_come_in_the_order_of_their_steps(run: RunFolder) -> None:
    paths = {step: checkpoint(run, f"step-{step}") for step in (100, 9, 20)}
    assert run.checkpoints() == [(9, paths[9]), (20, paths[20]), (100, paths[100])]
    assert run.latest_checkpoint() == (100, paths[100])
    assert run.checkpoint_path(20) == paths[20]


def test_incomplete_checkpoints_and_foreign_files_are_ignored(run: RunFolder) -> None:
    good = checkpoint(run, "step-3")
    checkpoint(run, "step-9.partial")
    checkpoint(run, "step-8", complete=False)
    for name in ("step-", "step-x", "step-7-copy", "my-step-7", "step--7", "step-\u0667", "STEP-7"):
        checkpoint(run, name)
    (run.checkpoints_path / "step-11").write_text("a file")
    (run.checkpoints_path / ".DS_Store").write_bytes(b"x")
    (run.checkpoints_path / "step-12").symlink_to("nowhere")
    (run.path / "notes.txt").write_text("x")
    assert run.checkpoints() == [(3, good)]
    assert RunFolder.open(run.path).latest_checkpoint() == (3, good)


def test_a_run_whose_checkpoints_were_deleted_has_none(run: RunFolder) -> None:
    run.checkpoints_path.rmdir()
    assert run.checkpoints() == []
    assert run.latest_checkpoint() is None


def test_of_two_checkpoints_of_a_step_the_new_one_counts_until_it_has_its_name(run: RunFolder) -> None:
    old, new = checkpoint(run, "step-4"), checkpoint(run, "step-4.new")
    (new / "which").write_text("the new one")
    checkpoint(run, "step-3")
    assert run.checkpoints() == [(3, run.checkpoint_path(3)), (4, new)]
    run.settle()
    assert run.checkpoints() == [(3, run.checkpoint_path(3)), (4, old)]
    assert (old / "which").read_text() == "the new one"
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["step-3", "step-4"]


def test_a_new_one_without_an_old_one_gets_its_name_too(run: RunFolder) -> None:
    checkpoint(run, "step-4.new")
    checkpoint(run, "step-4.old.partial")  # killed between the two renames
    run.settle()
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-4"]


def test_what_killed_processes_left_is_removed_and_nothing_else(run: RunFolder) -> None:
    for name in ("step-2.partial", "step-4.old.partial", "step-6.new.partial"):
        checkpoint(run, name, complete=False)
    kept = [checkpoint(run, "step-8"), checkpoint(run, "step-9", complete=False), checkpoint(run, "mine.partial")]
    (run.path / f".{'0' * 16}.partial").write_text("half")
    (run.path / ".notes.partial").write_text("precious")
    run.settle()
    assert sorted(run.checkpoints_path.iterdir()) == sorted(kept)
    assert [path.name for path in run.path.glob(".*")] == [".notes.partial"]


def test_a_disk_that_refuses_the_new_name_is_told_and_both_stay(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(run, "step-4")
    new = checkpoint(run, "step-4.new")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="step-4: cannot be removed: Read-only file system"):
        run.settle()
    assert run.checkpoints() == [(4, new)]
