"""Which text is read, in which order, and what is said of files that are no text."""

import gzip
import json
import os
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tessera.data.corpus import Seen, find_corpus, scan
from tessera.recipe import UserError

EXTENSIONS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")


def documents(*sources: Path | str, field: str = "text") -> list[str]:
    return list(find_corpus([str(s) for s in sources], EXTENSIONS, field).documents())


def message(*sources: Path | str, field: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        scan(find_corpus([str(s) for s in sources], EXTENSIONS, field))
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Which files, in which order


def test_the_standard_library_is_every_source_but_tests_and_packages() -> None:
    files = find_corpus("python-stdlib", (".txt",), "text").files
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    expected = {path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts[:-1])}
    assert set(files) == expected and len(files) == len(expected) > 300
    assert root / "os.py" in files and root / "json" / "decoder.py" in files


def test_files_come_in_the_order_of_their_names_and_sources_in_the_order_given(tmp_path) -> None:
    for name in ("b/z.txt", "b/a.txt", "b-c.txt", "b.md", "B.py", "a/inner/deep.txt", "a/x.txt"):
        write(tmp_path / "folder" / name, name)
    last = write(tmp_path / "0.txt", "0")
    expected = ["B.py", "a/inner/deep.txt", "a/x.txt", "b/a.txt", "b/z.txt", "b-c.txt", "b.md"]
    assert documents(tmp_path / "folder", last) == [*expected, "0"]
    assert documents(last, tmp_path / "folder") == ["0", *expected]


def test_only_the_extensions_of_a_folder_are_read_but_any_file_named_itself(tmp_path) -> None:
    write(tmp_path / "UPPER.TXT", "upper")
    other = write(tmp_path / "notes.rst", "rst")
    assert documents(tmp_path) == ["upper"]
    assert documents(other) == ["rst"]


def test_a_file_reached_twice_is_read_once(tmp_path) -> None:
    file = write(tmp_path / "a.txt", "a")
    (tmp_path / "link.txt").symlink_to(file)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert documents(tmp_path, file, str(tmp_path / "." / "a.txt")) == ["a"]


def test_the_digest_follows_contents_and_order_not_places(tmp_path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "a.txt", "first")
        write(tmp_path / folder / "b.txt", "second")
    lines = write(tmp_path / "c.jsonl", '{"text": "first"}\n{"text": "second"}\n')
    swapped = write(tmp_path / "d.jsonl", '{"text": "second"}\n{"text": "first"}\n')
    digest = [
        scan(find_corpus(str(p), EXTENSIONS, "text")).digest
        for p in (tmp_path / "one", tmp_path / "two", lines, swapped)
    ]
    assert digest[0] == digest[1] == digest[2] != digest[3]


def test_a_scan_counts_documents_and_bytes(tmp_path) -> None:
    write(tmp_path / "a.txt", "漢字")
    write(tmp_path / "b.txt", "")
    write(tmp_path / "c.jsonl", '{"text": "xyz"}\n{"text": ""}\n{"text": null}\n')
    told = []
    found = scan(find_corpus(str(tmp_path), EXTENSIONS, "text"), lambda *fact: told.append(fact))
    assert found.bytes.tolist() == [6, 3] and found.empty == 3 and not found.skipped
    assert told[-1] == ("reading text", 3, 3)


# Text files


@given(st.text(min_size=1).filter(lambda t: "\0" not in t and not t.startswith("\ufeff")))
@settings(deadline=None)
def test_text_comes_as_it_is_written(tmp_path_factory, text: str) -> None:
    path = write(tmp_path_factory.mktemp("text") / "a.txt", text)
    assert documents(path) == [text]


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path) -> None:
    assert documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\rc\n")) == ["a\r\nb\rc\n"]


def test_files_that_are_no_text_are_skipped_and_named(tmp_path) -> None:
    write(tmp_path / "a.txt", "good")
    write(tmp_path / "binary.txt", b"PK\x03\x04\0\0")
    write(tmp_path / "latin.txt", "caf\xe9".encode("latin-1"))
    write(tmp_path / "utf16.txt", "text".encode("utf-16"))
    write(tmp_path / "surrogate.txt", b"\xed\xa0\x80")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for ever
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.txt")), b"\xff")
    found = scan(find_corpus(str(tmp_path), EXTENSIONS, "text"))
    reasons = {os.fsencode(path.name): reason for path, reason in found.skipped}
    assert reasons == {
        b"binary.txt": "binary",
        b"latin.txt": "not UTF-8 at byte 3",
        b"utf16.txt": "binary",
        b"surrogate.txt": "not UTF-8 at byte 0",
        b"gone.txt": "No such file or directory",
        b"pipe.txt": "not a regular file",
        b"bad\xff.txt": "not UTF-8 at byte 0",
    }
    assert len(found.content) == 1


def test_a_file_and_a_folder_without_permission_are_skipped(tmp_path, monkeypatch) -> None:
    write(tmp_path / "a.txt", "good")
    closed = write(tmp_path / "closed.txt", "secret")
    write(tmp_path / "folder" / "b.txt", "secret")
    allowed, listed = open, os.scandir

    def refuse(path, *args):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path, *args)

    def refuse_folder(path):
        if Path(path).name == "folder":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "scandir", refuse_folder)
    found = scan(find_corpus(str(tmp_path), EXTENSIONS, "text"))
    assert [(p.name, reason) for p, reason in found.skipped] == [
        ("folder", "Permission denied"), ("closed.txt", "Permission denied"),
    ]  # fmt: skip


def test_an_empty_corpus_says_what_was_looked_at(tmp_path) -> None:
    assert "no text found (0 files looked at)" in message(tmp_path)
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", b"\0")
    text = message(tmp_path)
    assert str(tmp_path) in text and "b.txt (binary)" in text and "1 documents without a character" in text


def test_a_source_that_does_not_exist_is_named(tmp_path) -> None:
    text = message(tmp_path / "nowhere")
    assert "nowhere" in text and "python-stdlib" in text


# Lines


def test_jsonl_holds_a_document_a_line_compressed_or_not(tmp_path) -> None:
    lines = '\ufeff{"text": "one\\n", "id": 1}\r\n\n  \n{"id": 2, "text": "two\u2028\u0085 \\u0000"}'
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "b.JSONL.GZ", gzip.compress(lines.encode()))
    assert documents(tmp_path) == ["one\n", "two\u2028\u0085 \0"] * 2


def test_another_field_can_hold_the_text(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "no", "content": "yes"}\n')
    assert documents(path, field="content") == ["yes"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1, 2]", "holds a list, not an object"),
        ('"text"', "holds a string, not an object"),
        ("3", "holds a number, not an object"),
        ('{"body": "x"}', 'has no field "text", but "body"; see data.text_field'),
        ("{}", "no field at all"),
        ('{"text": 3}', "holds a number, not a string"),
        ('{"text": ["a"]}', "holds a list, not a string"),
        ('{"text": "\\ud800"}', "surrogates not allowed"),
        ('{"text": "cut', "line 1 column"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "Exceeds the limit"),
        (b'{"text": "caf\xe9"}', "invalid continuation byte"),
        (b"\0\0\0", "Expecting value"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_broken_line_is_an_error_with_file_and_line(tmp_path, name: str, line, reason: str) -> None:
    bad = line if isinstance(line, bytes) else line.encode()
    content = b'{"text": "fine"}\n\n' + bad + b'\n{"text": "fine"}\n'
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    text = message(path)
    assert text.startswith(f"{path}:3: broken line") and reason in text


def test_a_torn_or_false_archive_is_an_error_with_file_and_line(tmp_path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000))
    whole = gzip.compress(lines)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for content in (whole[:-300], whole[: len(whole) // 2], flipped, b"plain text"):
        text = message(write(tmp_path / "a.jsonl.gz", content))
        assert text.startswith(f"{tmp_path}/a.jsonl.gz:")


# Rows


def table(path: Path, column: pa.Array, name: str = "text") -> Path:
    parquet.write_table(pa.table({name: column, "other": pa.nulls(len(column))}), path, row_group_size=700)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_holds_a_document_a_row(tmp_path, kind: pa.DataType) -> None:
    rows = [f"row {i % 1700}\n漢" for i in range(3000)]
    path = table(tmp_path / "a.parquet", pa.array([*rows, None, ""], pa.string()).cast(kind))
    seen = Seen()
    assert list(find_corpus(str(path), EXTENSIONS, "text").documents(seen)) == rows
    assert seen.empty == 2


def test_a_wrong_column_is_named_with_what_there_is(tmp_path) -> None:
    path = table(tmp_path / "a.parquet", pa.array([1, 2]), name="number")
    assert 'no column "text", but "number", "other"' in message(path)
    assert 'column "number" holds int64, not strings' in message(path, field="number")


def test_a_broken_parquet_file_is_an_error_with_its_name(tmp_path) -> None:
    path = table(tmp_path / "a.parquet", pa.array([os.urandom(40).hex() for _ in range(2000)]))
    data = path.read_bytes()
    for content in (b"PAR1 no parquet PAR1", data[:-100], b"", data[:200] + bytes(4000) + data[4200:]):
        assert message(write(path, content)).startswith(f"{path}: row ")


def test_invalid_utf8_in_a_row_is_an_error_with_its_number(tmp_path) -> None:
    values = pa.array([b"fine", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, values.buffers())
    assert message(table(tmp_path / "a.parquet", text)).startswith(f"{tmp_path}/a.parquet: row 2: ")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch) -> None:
    path = table(tmp_path / "a.parquet", pa.array(["x"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "tessera[parquet]" in message(path)


def test_documents_are_streamed(tmp_path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path = write(tmp_path / "a.jsonl", line * 3 + "broken")
    stream = find_corpus(str(path), EXTENSIONS, "text").documents()
    assert len(next(stream)) == 1000  # the broken line is not met before its turn
