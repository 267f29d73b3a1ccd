"""Text on disk as a stream of documents, in an order that depends on names and contents alone.

    .jsonl, .jsonl.gz    a document a line: the string in the field `text_field` of a JSON object
    .parquet             a document a row: the string in the column `text_field` (needs the extra tessera[parquet])
    anything else        a document a file, UTF-8; line ends stay as they are, a byte order mark is dropped

A folder is walked without following links to folders, its files sorted by the parts of their path; several sources
keep the order of the list, and a file reached twice is read once. "python-stdlib" is the standard library of the
running interpreter without its tests and installed packages.

A text file that cannot be read, is binary or is not UTF-8 is skipped and counted: a folder of real text has some. A
broken line or row stops the work instead, with file and line, because the documents before it would be half a file.
Documents without a character are dropped and counted.

The corpus is streamed, once to `scan` it and again for each later use, so its size is not bounded by memory. It is
known by the contents of its documents, not by where they lie.
"""

import gzip
import json
import os
import stat
import sysconfig
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from tessera.data.draws import U64
from tessera.recipe import UserError

PYTHON_STDLIB = "python-stdlib"
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests"})
_BOM = b"\xef\xbb\xbf"
_ROWS = 1024  # of a Parquet file in memory at once

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, in order, and what was left out on the way to them."""

    sources: tuple[str, ...]
    files: tuple[Path, ...]
    text_field: str
    skipped: tuple[tuple[Path, str], ...] = ()  # folders that cannot be listed, with the reason

    def documents(self, seen: "Seen | None" = None) -> Iterator[str]:
        """The documents that hold at least a character; what is left out is written into `seen`.

        Raises UserError for a broken line or row.
        """
        seen = seen or Seen()
        for number, path in enumerate(self.files):
            seen.files = number
            for text in _read(path, self.text_field, seen.skipped):
                if text:
                    yield text
                else:
                    seen.empty += 1
        seen.files = len(self.files)


@dataclass
class Seen:
    """What a pass over the corpus came across, filled in as it goes."""

    files: int = 0  # read to their end
    empty: int = 0  # documents without a character
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # files, with the reason


@dataclass(frozen=True)
class Scan:
    """What a first pass knows of every document: n documents, in the order of the corpus."""

    content: U64  # [n]: the first 64 bits of each document's SHA-256
    bytes: NDArray[np.int64]  # [n]: length in UTF-8
    digest: str  # SHA-256 over all documents, in order
    empty: int
    skipped: tuple[tuple[Path, str], ...]


def find_corpus(source: str | Sequence[str], extensions: Sequence[str], text_field: str) -> Corpus:
    """Look up the files of `source`: "python-stdlib", a file or folder, or several of these.

    `extensions` choose the files of a folder, in any case; a file named by itself is read whatever its name.
    Raises UserError for a source that does not exist.
    """
    sources = (source,) if isinstance(source, str) else tuple(source)
    found: dict[str, Path] = {}
    skipped: list[tuple[Path, str]] = []
    for name in sources:
        for path in _files_of(name, tuple(e.lower() for e in extensions), skipped):
            found.setdefault(os.path.realpath(path), path)
    return Corpus(sources, tuple(found.values()), text_field, tuple(skipped))


def scan(corpus: Corpus, progress: Progress | None = None) -> Scan:
    """Read the whole corpus once; raises UserError for a broken line and for a corpus without any document."""
    content, sizes, whole, seen = array("Q"), array("q"), sha256(), Seen()
    told = 0
    for text in corpus.documents(seen):
        key, size, digest = fingerprint(text)
        content.append(key)
        sizes.append(size)
        whole.update(digest)
        if progress and seen.files > told:
            told = seen.files
            progress("reading text", told, len(corpus.files))
    if progress:
        progress("reading text", len(corpus.files), len(corpus.files))
    skipped = (*corpus.skipped, *seen.skipped)
    if not content:
        raise UserError(_nothing_found(corpus, seen, skipped))
    return Scan(
        content=np.frombuffer(content, dtype=np.uint64),
        bytes=np.frombuffer(sizes, dtype=np.int64),
        digest=whole.hexdigest(),
        empty=seen.empty,
        skipped=skipped,
    )


def fingerprint(text: str) -> tuple[int, int, bytes]:
    """A document's key (first 64 bits of its SHA-256), its length in UTF-8 and the SHA-256 itself."""
    data = text.encode()
    digest = sha256(data).digest()
    return int.from_bytes(digest[:8], "little"), len(data), digest


def named(skipped: Sequence[tuple[Path, str]], most: int = 3) -> str:
    """The first few of the skipped files with their reasons, as one line."""
    names = [f"{printable(path)} ({reason})" for path, reason in skipped[:most]]
    return ", ".join(names) + (", ..." if len(skipped) > most else "")


def printable(path: Path) -> str:
    """A path as text that any terminal and JSON takes, also where the name's bytes are no UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _nothing_found(corpus: Corpus, seen: Seen, skipped: Sequence[tuple[Path, str]]) -> str:
    facts = [f"{len(corpus.files)} files looked at"]
    if skipped:
        facts.append(f"{len(skipped)} of them skipped: {named(skipped)}")
    if seen.empty:
        facts.append(f"{seen.empty} documents without a character")
    return (
        f"data.source = {', '.join(corpus.sources)}: no text found ({'; '.join(facts)})\n"
        "  name files of text, or folders that hold files with one of data.extensions"
    )


# Files


def _files_of(name: str, extensions: tuple[str, ...], skipped: list[tuple[Path, str]]) -> Iterator[Path]:
    if name == PYTHON_STDLIB:
        yield from _walk(Path(sysconfig.get_paths()["stdlib"]), (".py",), _NOT_LIBRARY, skipped)
        return
    path = Path(name)
    if path.is_dir():
        yield from _walk(path, extensions, frozenset(), skipped)
    elif os.path.lexists(path):
        yield path
    else:
        raise UserError(
            f'data.source: "{name}" does not exist; it must be "{PYTHON_STDLIB}", a file or a folder, '
            f"relative to {os.getcwd()}"
        )


def _walk(
    folder: Path, extensions: tuple[str, ...], left_out: frozenset[str], skipped: list[tuple[Path, str]]
) -> list[Path]:
    def cannot_list(error: OSError) -> None:
        skipped.append((Path(error.filename or folder), error.strerror or str(error)))

    files = []
    for place, folders, names in os.walk(folder, onerror=cannot_list):
        folders[:] = [name for name in folders if name not in left_out]
        files += [Path(place, name) for name in names if name.lower().endswith(extensions)]
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


# Documents


def _read(path: Path, text_field: str, skipped: list[tuple[Path, str]]) -> Iterator[str]:
    name = path.name.lower()
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            skipped.append((path, "not a regular file"))
            return
        file = open(path, "rb")  # noqa: SIM115 -- closed below; only the opening may be skipped
    except OSError as error:
        skipped.append((path, error.strerror or str(error)))
        return
    with file:
        if name.endswith(".parquet"):
            yield from _rows(path, file, text_field)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _lines(path, file, text_field)
        else:
            yield from _text(path, file, skipped)


def _text(path: Path, file: BinaryIO, skipped: list[tuple[Path, str]]) -> Iterator[str]:
    try:
        data = file.read()
        if b"\0" in data:
            skipped.append((path, "binary"))
            return
        text = data.removeprefix(_BOM).decode()
    except OSError as error:
        skipped.append((path, error.strerror or str(error)))
    except UnicodeDecodeError as error:
        skipped.append((path, f"not UTF-8 at byte {error.start}"))
    else:
        yield text


def _lines(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    number = 0
    try:
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.name.lower().endswith(".gz") else file
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield _field(line, text_field, f"{printable(path)}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{printable(path)}:{number + 1}: cannot be read on from here: {error}\n"
            "  repair the file, or take it out of data.source"
        ) from error


def _field(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line.decode())
        if not isinstance(record, dict):
            raise ValueError(f"holds {_kind(record)}, not an object")
        if text_field not in record:
            raise ValueError(f'has no field "{text_field}", but {_names(record)}; see data.text_field')
        text = record[text_field]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise ValueError(f'"{text_field}" holds {_kind(text)}, not a string')
        text.encode()  # JSON can escape half a surrogate pair, which is no text
        return text
    except (ValueError, RecursionError) as error:  # of UTF-8, JSON or the checks above
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(
            f'{where}: broken line: {reason}\n  each line must be a JSON object with text in "{text_field}"'
        ) from None


def _rows(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{printable(path)}: reading Parquet needs pyarrow; install it with: pip install 'tessera[parquet]'"
        ) from None
    row = 0
    try:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        if text_field not in schema.names:
            raise UserError(
                f'{printable(path)}: has no column "{text_field}", but {_names(schema.names)}; see data.text_field'
            )
        kind = schema.field(text_field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise UserError(f'{printable(path)}: column "{text_field}" holds {kind}, not strings; see data.text_field')
        for batch in table.iter_batches(batch_size=_ROWS, columns=[text_field]):
            for value in batch.column(0):
                yield value.as_py() or ""
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{printable(path)}: row {row + 1}: cannot be read: {error}\n"
            "  repair the file, or take it out of data.source"
        ) from error


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _names(names: Any) -> str:
    names = list(names)
    shown = ", ".join(f'"{name}"' for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return shown or "no field at all"
