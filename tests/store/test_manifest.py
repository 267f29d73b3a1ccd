"""A manifest finds every accident that can happen to a folder, and minds nothing else."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from tessera.recipe import UserError
from tessera.store import publish_folder, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one of them in a subfolder, with their manifest."""
    folder = tmp_path / "step-10"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "optimizer" / "0.safetensors").write_bytes(b"")
    write_manifest(folder)
    return folder


def test_the_manifest_lists_size_and_digest_of_every_file(folder: Path) -> None:
    assert json.loads((folder / "manifest.json").read_text()) == {
        "schema": 1,
        "files": {
            "model.safetensors": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
            "optimizer/0.safetensors": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
        },
    }
    verify_manifest(folder)


def test_writing_the_manifest_again_gives_the_same_bytes(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_partial_files_are_not_listed(folder: Path) -> None:
    (folder / ".1234.partial").write_bytes(b"half")
    (folder / "shards.partial").mkdir()
    (folder / "shards.partial" / "file").write_bytes(b"half")
    write_manifest(folder)
    assert len(json.loads((folder / "manifest.json").read_text())["files"]) == 2


def test_foreign_files_do_not_disturb_a_complete_folder(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"foreign")
    (folder / "notes").mkdir()
    verify_manifest(folder)


def test_a_changed_byte_is_found_and_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UserError, match=r"step-10/model\.safetensors: has another SHA-256"):
        verify_manifest(folder)


def test_a_shortened_file_is_found_and_named_with_both_sizes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weigh")
    with pytest.raises(UserError, match=r"model\.safetensors: has 5 bytes, but manifest\.json says 7"):
        verify_manifest(folder)


def test_a_missing_file_is_found_and_named(folder: Path) -> None:
    (folder / "optimizer" / "0.safetensors").unlink()
    with pytest.raises(UserError, match=r"optimizer/0\.safetensors: is missing.*take another copy"):
        verify_manifest(folder)


def test_of_two_bad_files_the_first_is_named(folder: Path) -> None:
    (folder / "optimizer" / "0.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        verify_manifest(folder)


def test_a_folder_without_manifest_does_not_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read: No such file"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "schema = None: must be an integer"),
        ('{"schema": 2, "files": {}}', "schema = 2: this tessera reads up to schema 1; upgrade"),
        ('{"schema": 0, "files": {}}', "schema = 0: there is no such version"),
        ("[" * 100_000, "nested too deeply"),
        (" " * 2**20 + "{}", "has 1048578 bytes; such a file has 1048576 at most"),
        ('{"schema": 1, "files": {"a": {"bytes": 0, "sha256": ""}, "a": {}}}', "stands in an object twice"),
        ('{"schema": 1}', "must list files"),
        ('{"schema": 1, "files": {"a": 3}}', '"a" must have bytes and sha256'),
        ('{"schema": 1, "files": {"a": {"bytes": true, "sha256": ""}}}', '"a" must have bytes and sha256'),
        ('{"schema": 1, "files": {"../a": {"bytes": 0, "sha256": ""}}}', "is no file of the folder"),
        ('{"schema": 1, "files": {"/etc/passwd": {"bytes": 0, "sha256": ""}}}', "is no file of the folder"),
        ('{"schema": 1, "files": {"\\ud800": {"bytes": 0, "sha256": ""}}}', "is no file of the folder"),
        ('{"schema": 1, "files": {"a\\u0000b": {"bytes": 0, "sha256": ""}}}', "is no file of the folder"),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        verify_manifest(folder)
    assert "manifest.json" in str(error.value)


def test_a_folder_is_published_with_its_manifest_in_one_step(tmp_path: Path) -> None:
    partial = tmp_path / "step-5.partial"
    partial.mkdir()
    (partial / "file").write_bytes(b"x")
    publish_folder(partial, tmp_path / "step-5")
    verify_manifest(tmp_path / "step-5")
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_publishing_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "step-5.partial").mkdir()
    (tmp_path / "step-5").mkdir()
    with pytest.raises(UserError, match="step-5: cannot be written: it exists already"):
        publish_folder(tmp_path / "step-5.partial", tmp_path / "step-5")


def test_a_disk_that_fails_before_the_rename_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    partial = tmp_path / "step-5.partial"
    partial.mkdir()
    (partial / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"manifest\.json: cannot be written: No space left"):
        publish_folder(partial, tmp_path / "step-5")
    assert not (tmp_path / "step-5").exists()


def test_a_folder_that_does_not_exist_gets_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        write_manifest(tmp_path / "absent")


def test_a_file_that_the_reader_needs_must_be_listed(folder: Path) -> None:
    verify_manifest(folder, ["model.safetensors", "optimizer/0.safetensors"])
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json: does not list state\.json"):
        verify_manifest(folder, ["model.safetensors", "state.json"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer", "manifest.json"])
def test_a_link_is_refused_even_where_it_leads_to_the_true_bytes(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=rf"{name}: is a symbolic link, which is not followed here"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=rf"{name}: is no regular file"):
        verify_manifest(folder)
