"""A folder of files that vouches for itself: manifest.json lists every file with its size and SHA-256.

    {"schema": 1, "files": {"model.safetensors": {"bytes": 4096, "sha256": "9f86..."}}}

The manifest is written last. So a folder with a manifest was complete once, and one whose manifest verifies still
is. Files that the manifest does not name, such as those that file browsers leave, are no concern of it. It
protects against accidents, not against an author of false manifests: such a one can make readers refuse a folder,
but not make them leave it, follow a link, or read more than the folder holds.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tessera.recipe import UserError
from tessera.store.files import regular_size, sha256_file, sync_folder, unwritable
from tessera.store.json_text import check_schema, read_object, write_json

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the names of files and folders that are still being written
_SCHEMA = 1
_LARGEST = 2**20  # bytes of a manifest: some thousand files
_REPAIR = "the folder is damaged or incomplete; take another copy or an earlier checkpoint"


def write_manifest(folder: Path) -> None:
    """Bring the files of a folder and its subfolders to the disk, and write the manifest that lists them.

    Left out are the manifest itself and names ending in ".partial". Raises UserError.
    """
    files: dict[str, dict[str, Any]] = {}
    try:
        paths = list(_files(folder))
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # a manifest must not outlive the bytes that it vouches for
                size = os.fstat(file.fileno()).st_size
            files[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": sha256_file(path)}
        for place in {path.parent for path in paths}:
            sync_folder(place)
    except OSError as error:
        raise unwritable(folder / MANIFEST, error) from error
    write_json(folder / MANIFEST, {"schema": _SCHEMA, "files": files})


def verify_manifest(folder: Path, required: Collection[str] = ()) -> None:
    """Raise UserError naming the first file of the manifest that is missing or changed, or the manifest.

    `required` are names that the manifest must list, since they are going to be read.
    """
    manifest = folder / MANIFEST
    content = read_object(manifest, _LARGEST)
    check_schema(manifest, content.get("schema"), _SCHEMA)
    files = content.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{manifest}: must list files; {_REPAIR}")
    if missing := [name for name in required if name not in files]:
        raise UserError(f"{manifest}: does not list {missing[0]}; {_REPAIR}")
    for name, facts in sorted(files.items()):
        _verify_file(folder, name, facts)


def publish_folder(partial: Path, path: Path) -> None:
    """Turn a folder that was filled under a ".partial" name into a complete one: manifest, then one rename.

    A crash at any moment leaves `path` complete or absent. Raises UserError, also where `path` exists.
    """
    write_manifest(partial)
    try:
        if path.exists():  # rename would silently replace an empty folder
            raise FileExistsError(0, "it exists already")
        os.rename(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def _files(folder: Path) -> Iterator[Path]:
    for place, subfolders, names in os.walk(folder, onerror=_raise):
        subfolders[:] = sorted(name for name in subfolders if not name.endswith(PARTIAL))
        for name in sorted(names):
            path = Path(place, name)
            if not name.endswith(PARTIAL) and path != folder / MANIFEST:
                yield path


def _raise(error: OSError) -> None:
    raise error


def _is_text(name: str) -> bool:
    """False for what JSON can write and no file system can be asked for: half a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _verify_file(folder: Path, name: str, facts: Any) -> None:
    manifest, relative = folder / MANIFEST, PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name or not _is_text(name):
        raise UserError(f'{manifest}: "{name}" is no file of the folder; {_REPAIR}')
    size, digest = (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
    if type(size) is not int or not isinstance(digest, str):
        raise UserError(f'{manifest}: "{name}" must have bytes and sha256; {_REPAIR}')
    path = folder / relative
    for place in [folder / above for above in relative.parents if above != PurePosixPath(".")]:
        if place.is_symlink():
            raise UserError(f"{place}: is a symbolic link, which is not followed here; {_REPAIR}")
    if not os.path.lexists(path):
        raise UserError(f"{path}: is missing, but {MANIFEST} lists it; {_REPAIR}")
    found = regular_size(path)
    if found != size:
        raise UserError(f"{path}: has {found} bytes, but {MANIFEST} says {size}; {_REPAIR}")
    if sha256_file(path) != digest:
        raise UserError(f"{path}: has another SHA-256 than {MANIFEST} says; {_REPAIR}")
