"""The log of a run stays whole through crashes, full disks, resumed runs and readers that come too early."""

import errno
import io
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.recipe import UserError
from tessera.store import EventWriter, read_events
from tessera.store.events import event_before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def steps(path: Path) -> list[int]:
    return [event["step"] for event in read_events(path)]


def write_steps(path: Path, *numbers: int) -> None:
    with EventWriter(path, "tiny") as writer:
        for number in numbers:
            writer.write("step", number, loss=float(number))


def test_events_come_back_in_order_with_their_head(path: Path) -> None:
    before = time.time()
    with EventWriter(path, "tiny") as writer:
        writer.write("start", 0, arm="fp8", notes=["a", "b"])
        writer.write("step", 1, loss=2.5)
    first, second = read_events(path)
    assert abs(first.pop("time") - before) < 60
    assert first == {
        "schema": 1,
        "kind": "start",
        "run": "tiny",
        "step": 0,
        "arm": "fp8",
        "notes": ["a", "b"],
    }
    assert (second["kind"], second["loss"]) == ("step", 2.5)


def test_only_the_kinds_asked_for_are_read(path: Path) -> None:
    with EventWriter(path, "tiny") as writer:
        for kind in ("start", "step", "load", "step", "end"):
            writer.write(kind, 0)
    assert [event["kind"] for event in read_events(path, "step", "end")] == ["step", "step", "end"]
    assert list(read_events(path, "sample")) == []


def test_a_line_can_be_read_as_soon_as_it_is_written(path: Path) -> None:
    with EventWriter(path, "tiny") as writer:
        for number in range(3):
            writer.write("step", number)
            assert steps(path) == list(range(number + 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_numbers_that_are_not_finite_become_null(path: Path, value: float) -> None:
    with EventWriter(path, "tiny") as writer:
        writer.write("step", 0, loss=value, nested={"list": [1.0, (value,)]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    event = json.loads(path.read_text(), parse_constant=refuse)
    assert event["loss"] is None
    assert event["nested"] == {"list": [1.0, [None]]}


def test_arrays_scalars_and_paths_are_written_as_what_they_hold(path: Path) -> None:
    with EventWriter(path, "tiny") as writer:
        writer.write(
            "load",
            np.int64(7),  # type: ignore[arg-type]
            counts=np.array([[1, 2], [3, 4]]),
            share=np.float32(0.5),
            flag=np.True_,
            path=Path("a/b"),
            halves=np.array([0.5, np.nan]),
        )
    event = next(read_events(path))
    assert event["step"] == 7
    assert event["counts"] == [[1, 2], [3, 4]]
    assert (event["share"], event["flag"], event["path"]) == (0.5, True, "a/b")
    assert event["halves"] == [0.5, None]


def test_what_json_has_no_form_for_is_refused_and_writes_nothing(path: Path) -> None:
    with EventWriter(path, "tiny") as writer:
        with pytest.raises(TypeError):
            writer.write("step", 0, value=object())
        with pytest.raises(ValueError, match="the writer itself sets run"):
            writer.write("step", 0, run="other")
        assert writer.offset == 0


@given(text=st.text() | st.sampled_from(["line\nbreak", "\u2028\u2029\x85", "\x00", "\ud800"]))
def test_any_text_stays_on_its_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "events.jsonl"
    with EventWriter(path, "tiny") as writer:
        writer.write("sample", 0, text=text)
        writer.write("end", 1)
    assert len(path.read_bytes().decode("utf-8").splitlines()) == 2
    assert next(read_events(path))["text"] == text


def test_the_offset_is_the_size_of_the_file_after_every_event(path: Path) -> None:
    with EventWriter(path, "tiny") as writer:
        assert writer.offset == 0
        for number in range(3):
            writer.write("step", number, text="é" * number)
            assert writer.offset == path.stat().st_size
    with EventWriter(path, "tiny") as writer:
        assert writer.offset == path.stat().st_size > 0


def test_every_offset_is_a_place_to_go_on_from(path: Path) -> None:
    with EventWriter(path, "tiny") as writer:
        offsets = [writer.offset]
        for number in range(4):
            writer.write("step", number)
            offsets.append(writer.offset)
    whole = path.read_bytes()
    for kept, offset in enumerate(offsets):
        path.write_bytes(whole)
        with EventWriter(path, "tiny", offset=offset) as writer:
            assert writer.offset == offset
            writer.write("start", kept, resumed=True)
        assert path.read_bytes().startswith(whole[:offset])
        assert steps(path) == [*range(kept), kept]


@pytest.mark.parametrize("wrong", [-40, 5, 10_000])
def test_an_offset_that_the_file_does_not_have_is_refused_and_cuts_nothing(path: Path, wrong: int) -> None:
    write_steps(path, 0, 1)
    before = path.read_bytes()
    offset = wrong if wrong > 0 else len(before) + wrong
    with pytest.raises(UserError, match=f"events.jsonl: has {len(before)} bytes.*ends at byte {offset}"):
        EventWriter(path, "tiny", offset=offset)
    assert path.read_bytes() == before


def test_a_line_torn_at_any_byte_is_skipped_and_the_next_writer_cuts_it_off(path: Path) -> None:
    write_steps(path, 0, 1, 2)
    whole = path.read_bytes()
    second_end = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for size in range(second_end, len(whole)):
        path.write_bytes(whole[:size])
        assert steps(path) == [0, 1]
        write_steps(path, 3)
        assert steps(path) == [0, 1, 3]


@pytest.mark.parametrize("tail", [b"\x00" * 100, b"\x00\n", b"\xff\xfe\n", b"{}{\n", b"[]\n", b"\n"])
def test_a_tail_of_rubbish_is_skipped_and_the_next_writer_cuts_it_off(path: Path, tail: bytes) -> None:
    write_steps(path, 0)
    with open(path, "ab") as file:
        file.write(tail)
    assert steps(path) == [0]
    write_steps(path, 1)
    assert steps(path) == [0, 1]


def test_a_torn_line_with_whole_ones_behind_it_is_an_error_that_names_its_line(path: Path) -> None:
    write_steps(path, 0, 1, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    events = read_events(path)
    assert next(events)["step"] == 0
    with pytest.raises(UserError, match=r"events\.jsonl: line 2 is no whole event"):
        next(events)


def test_a_reader_at_a_half_written_line_does_not_take_its_rest_for_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(path, 0, 1)
    first, second = path.read_bytes().splitlines(keepends=True)

    class Growing(io.BytesIO):
        """A file that ends inside the second line when it is read, and has grown when it is read again."""

        def __iter__(self):
            yield from (first, second[:20], second[20:])

    monkeypatch.setattr("builtins.open", lambda *_: Growing())
    assert steps(path) == [0]


def test_the_offset_that_a_checkpoint_keeps_is_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    with EventWriter(path, "tiny") as writer:
        writer.write("step", 0)
        monkeypatch.setattr(os, "fsync", watched)
        assert writer.offset == synced[-1] == path.stat().st_size


def test_a_disk_that_fills_up_inside_a_line_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = EventWriter(path, "tiny")
    writer.write("step", 0)
    size = writer.offset
    write = io.FileIO.write

    class NearlyFull(io.FileIO):
        room = 30

        def write(self, data: bytes) -> int:  # type: ignore[override]
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = write(self, bytes(data)[: self.room])
            self.room -= written
            return written

    whole, writer._file = writer._file, NearlyFull(path, "a+")
    with pytest.raises(UserError, match=r"events\.jsonl: cannot be written: No space left.*free some space"):
        writer.write("step", 1, text="long" * 50)
    assert path.stat().st_size == size
    writer._file = whole
    writer.write("step", 2)  # there is room again
    writer.close()
    assert steps(path) == [0, 2]


def test_a_write_that_takes_a_few_bytes_at_a_time_is_completed(path: Path) -> None:
    class Slow(io.FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            return super().write(bytes(data)[:7])

    with EventWriter(path, "tiny") as writer:
        whole, writer._file = writer._file, Slow(path, "a+")
        writer.write("step", 0, text="long" * 50)
        assert writer.offset == path.stat().st_size
        writer._file = whole
    assert steps(path) == [0]


def test_an_interrupt_inside_a_line_leaves_whole_lines_and_a_right_offset(path: Path) -> None:
    class Interrupted(io.FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            super().write(bytes(data)[:9])
            raise KeyboardInterrupt

    with EventWriter(path, "tiny") as writer:
        writer.write("step", 0)
        whole, writer._file = writer._file, Interrupted(path, "a+")
        with pytest.raises(KeyboardInterrupt):
            writer.write("step", 1)
        writer._file = whole
        assert writer.offset == path.stat().st_size
        writer.write("step", 1)
    assert steps(path) == [0, 1]


def test_a_second_writer_is_refused_until_the_first_is_closed(path: Path) -> None:
    first = EventWriter(path, "tiny")
    first.write("step", 0)
    with pytest.raises(UserError, match="another process is writing it"):
        EventWriter(path, "tiny", offset=0)
    assert steps(path) == [0]  # and it has cut nothing
    first.close()
    first.close()
    EventWriter(path, "tiny").close()


def _write_and_die(path: Path) -> None:
    writer = EventWriter(path, "tiny")
    writer.write("step", 0)
    os._exit(1)


def test_a_writer_that_died_does_not_lock_the_next_one_out(path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    write_steps(path, 1)
    assert steps(path) == [0, 1]


def test_a_clock_that_jumps_back_changes_nothing_but_the_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([2e9, 1e9, -5.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    write_steps(path, 0, 1, 2)
    assert steps(path) == [0, 1, 2]
    assert [event["time"] for event in read_events(path)] == [2e9, 1e9, -5.0]


def test_a_newer_file_and_an_absent_one_are_named(path: Path) -> None:
    with pytest.raises(UserError, match=r"events\.jsonl: cannot be read: No such file"):
        next(read_events(path))
    path.write_text('{"schema": 2, "kind": "step"}\n')
    with pytest.raises(UserError, match=r"events\.jsonl: schema = 2.*upgrade tessera"):
        next(read_events(path))
    path.write_text('{"kind": "step"}\n')
    with pytest.raises(UserError, match=r"events\.jsonl: schema = None: must be an integer"):
        next(read_events(path))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/events\.jsonl: cannot be written: No such file"):
        EventWriter(tmp_path / "absent" / "events.jsonl", "tiny")
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        EventWriter(tmp_path, "tiny")


def test_the_event_that_ends_at_an_offset_is_found_and_nothing_where_no_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert event_before(path, 0) is None
    ends = []
    with EventWriter(path, "tiny") as writer:
        for step in range(5):
            writer.write("step" if step % 2 else "checkpoint", step, text="x" * 3000)
            ends.append(writer.offset)
    for offset in range(ends[-1] + 10):
        found = event_before(path, offset)
        if offset in ends:
            assert found is not None and found["step"] == ends.index(offset)
        else:
            assert found is None
