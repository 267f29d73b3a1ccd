"""One file, written so that a reader finds the old content or the new one, never half of either.

The recipe for POSIX file systems: write a new file in the same folder, fsync it, rename it over the old one, fsync
the folder. Without the first fsync a power failure can leave an empty file under the right name; without the last
one it can bring the old file back after the writer went on.
"""

import errno
import hashlib
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from tessera.recipe import UserError

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "choose a folder on another disk",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
}


class Unwritable(UserError):
    """What a disk refuses; nothing is wrong with the work itself, which may go on where a user wishes so."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file, or replace it, in one step that survives a crash; text is written as UTF-8.

    A symbolic link is replaced, not followed. Raises UserError naming the path and the reason; the old content
    is then still there.
    """
    data = content.encode() if isinstance(content, str) else content
    # Its own short name: one made from path.name could exceed the file system's limit.
    partial = path.parent / f".{secrets.token_hex(8)}.partial"
    try:
        try:
            with open(partial, "xb") as file:  # unlike tempfile's, its mode follows the user's umask
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:  # Ctrl-C too: no litter is left behind
            with suppress(OSError):
                partial.unlink()
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, after a rename; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync names by themselves and say this
            raise
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def read_small(path: Path, largest: int) -> bytes:
    """The bytes of a file of a folder that may come from anywhere; raises UserError.

    Read is a regular file of at most `largest` bytes, nothing else: a symbolic link leads out of the folder, a pipe
    never ends, and a large file fills the memory.
    """
    size = regular_size(path)
    if size > largest:
        raise UserError(f"{path}: has {size} bytes; such a file has {largest} at most; it is damaged")
    try:
        with open(path, "rb") as file:
            return file.read(largest)
    except OSError as error:
        raise unreadable(path, error) from error


def regular_size(path: Path) -> int:
    """Bytes of a regular file; raises UserError for anything else, symbolic links among it."""
    try:
        facts = path.lstat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(facts.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(facts.st_mode) else "no regular file"
        raise UserError(f"{path}: is {kind}, which is not followed here; put the file itself in its place")
    return facts.st_size


def unwritable(path: Path, error: OSError) -> Unwritable:
    """What a user is told when `path` cannot be written."""
    advice = _ADVICE.get(error.errno or 0)
    return Unwritable(f"{path}: cannot be written: {error.strerror or error}" + (f"; {advice}" if advice else ""))


def unreadable(path: Path, error: OSError) -> UserError:
    """What a user is told when `path` cannot be read."""
    return UserError(f"{path}: cannot be read: {error.strerror or error}")
