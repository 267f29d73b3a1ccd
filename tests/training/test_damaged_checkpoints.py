"""Mutated checkpoints: each is refused with the file's name and a way back, or loads exactly the same values.

Mutations under a manifest made anew reach the parsers; those of the values themselves are left to the hash. Every
answer must be a UserError, within a bound of memory, and nothing outside the folder may be read or run.
"""

import json
import os
import pickle
import random
import resource
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.cli.sample import make_sample
from tessera.data import Dataset
from tessera.model.weights import weights
from tessera.recipe import Recipe, UserError
from tessera.store import RunFolder, verify_checkpoint, write_manifest
from tessera.store.checkpoint_path import TENSORS
from tessera.training import checkpoint
from tessera.training.trainer import Trainer
from tessera.training.way_back import way_back
from tests.training.conftest import make_recipe
from tests.training.killed_run import dataset_of

PARTS = ("model", "optimizer", "ema")
TENSOR_FILES = [f"{part}/{TENSORS}" for part in PARTS]
READ = [*TENSOR_FILES, "state.json", "recipe.toml", "tokenizer.json"]
ROOM = 64 * 2**20  # bytes beyond what loading the sound checkpoint takes
NO_COUNT = (2**63, 2**64 - 1, 10**30, 10**400, -1, -(2**62))
HUGE = (2**31, 2**40, 2**62, 2**63 - 1, *NO_COUNT)

Mutation = Callable[[random.Random, Path], None]


class Victim:
    """A run with checkpoints at steps 2 and 4, the second of which is mutated."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        changes: dict[str, dict[str, Any]] = {
            "training": {"steps": 4, "ema_decay": 0.9, "health_interval": 0, "validation_interval": 0},
        }
        self.recipe: Recipe = make_recipe(corpus, changes)
        self.dataset: Dataset = dataset_of(self.recipe)
        self.run = RunFolder.create(folder, self.recipe)
        Trainer(self.recipe, self.run, self.dataset).run()
        self.path = self.run.checkpoint_path(4)
        self.earlier = self.run.checkpoint_path(2)
        self.kept = folder.with_name("kept")
        shutil.copytree(self.path, self.kept)
        self.owed = self.loaded()

    def restore(self) -> None:
        if self.path.is_symlink():
            self.path.unlink()
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.kept, self.path)

    def loaded(self) -> dict[str, Any]:
        """All that a resumed trainer holds; a UserError where it is refused."""
        trainer = Trainer.resume(self.run, self.dataset, self.path)
        assert trainer.ema is not None
        tensors = {
            "model": weights(trainer.model),
            "optimizer": trainer.optimizer.tensors(),
            "ema": trainer.ema.tensors(),
        }
        counts = (trainer.step, trainer.position, trainer.tokens, trainer.optimizer.steps, trainer.seconds)
        numbers = (*counts, trainer.stability.facts())
        trainer.ema.close()
        return {"tensors": tensors, "numbers": numbers, "random": torch.get_rng_state(), "offset": trainer._offset}

    def loads_the_same(self) -> bool:
        found = self.loaded()
        same = all(
            torch.equal(t, found["tensors"][part][name])
            for part, ts in self.owed["tensors"].items()
            for name, t in ts.items()
        )
        numbers = found["numbers"] == self.owed["numbers"] and found["offset"] == self.owed["offset"]
        return same and numbers and torch.equal(found["random"], self.owed["random"])


@pytest.fixture(scope="module")
def victim(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return Victim(tmp_path_factory.mktemp("victim") / "run", corpus)


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled or run")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (os, "system")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("builtins.eval", refuse)


# Mutations that the manifest finds


def flip_bits(draw: random.Random, path: Path) -> None:
    target = path / draw.choice([*READ, "manifest.json"])
    content = bytearray(target.read_bytes())
    for _ in range(draw.choice((1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    target.write_bytes(content)


def truncate(draw: random.Random, path: Path) -> None:
    target = path / draw.choice([*READ, "manifest.json"])
    os.truncate(target, draw.choice((0, 1, 7, 8, draw.randrange(target.stat().st_size))))


def append(draw: random.Random, path: Path) -> None:
    with open(path / draw.choice([*READ, "manifest.json"]), "ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 100)))


def remove(draw: random.Random, path: Path) -> None:
    (path / draw.choice([*READ, "manifest.json"])).unlink()


def remove_a_folder(draw: random.Random, path: Path) -> None:
    shutil.rmtree(path / draw.choice(PARTS))


def swap(draw: random.Random, path: Path) -> None:
    one, other = draw.sample(READ, 2)
    os.rename(path / one, path / "aside")
    os.rename(path / other, path / one)
    os.rename(path / "aside", path / other)


def take_a_file_of_another_step(draw: random.Random, path: Path) -> None:
    shutil.copy(path.with_name("step-2") / (name := draw.choice([*TENSOR_FILES, "state.json"])), path / name)


def replace_by_zeros(draw: random.Random, path: Path) -> None:
    target = path / draw.choice([*READ, "manifest.json"])
    target.write_bytes(bytes(target.stat().st_size))


# Mutations under a manifest that is made anew


def take_all_files_of_another_step(draw: random.Random, path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-2"), path)


def extra_file(draw: random.Random, path: Path) -> None:
    place = path / draw.choice((*PARTS, "."))
    (place / draw.choice(("model-00002-of-00002.safetensors", "x.safetensors", ".metadata", "notes.txt"))).write_bytes(
        draw.choice((b"", b"\x80\x04cos\nsystem\n", struct.pack("<Q", 2**62) + b"{}"))
    )


def other_schema(draw: random.Random, path: Path) -> None:
    change_state(path, schema=draw.choice((0, -1, 2, 99, 1.0, True, "1", None, [], 10**30)))


def hostile_state(draw: random.Random, path: Path) -> None:
    counts = ("step", "position", "tokens", "optimizer_steps", "event_offset", "seconds")
    name = draw.choice((*counts, "random", "data", "stability"))
    change_state(path, **{name: draw.choice((*NO_COUNT, 1.5e300, None, True, [], {}, [[]] * 100))})


def hostile_random(draw: random.Random, path: Path) -> None:
    value = draw.choice(("", "zz", "00", "00" * 5055, "ff" * 6000, "x" * 10112, 5, None, [0] * 5056))
    change_state(path, random={"cpu": value})


def hostile_stability(draw: random.Random, path: Path) -> None:
    facts = json.loads((path / "state.json").read_text())["stability"]
    name = draw.choice(sorted(facts))
    others = (["1"], [[1.0]], [None], [1]) if isinstance(facts[name], list) else ([], [1.0], "1")
    change_state(path, stability=facts | {name: draw.choice((None, "x", {}, True, *others))})


def state_without(draw: random.Random, path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    del state[draw.choice(sorted(state))]
    (path / "state.json").write_text(json.dumps(state))


def hostile_json(draw: random.Random, path: Path) -> None:
    deep = draw.choice((2_000, 100_000, 400_000))
    texts = ("[" * deep, '{"a":' * deep, "{", "", "\ufeff{}", "NaN", "7" * 5_000, '{"step": ' + "9" * 5_000 + "}", "[]")
    texts += ('{"schema": 1, "schema": 1}', '{"step": 1e999999999}', '{"step": NaN}', "null", '"\\ud800"', " " * 2**21)
    (path / "state.json").write_text(draw.choice(texts))


def hostile_header(draw: random.Random, path: Path) -> None:
    """One number or word of the JSON header of a tensor file becomes another, and the length is made to match."""
    target = path / draw.choice(TENSOR_FILES)
    header, data = split(target)
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = draw.randrange(9)
    if kind == 0:
        entry["shape"] = [draw.choice(HUGE) for _ in range(draw.randrange(1, 12))]
    elif kind == 1:
        entry["shape"] = draw.choice(([], [0], "ab", None, {}, [1.0], [True], [[1]], [*entry["shape"], 2]))
    elif kind == 2:
        entry["dtype"] = draw.choice(("F64", "F16", "I64", "BOOL", "F8_E4M3", "", None, 4, [], "F32", "BF16"))
        if entry["dtype"] in ("F32", "BF16"):
            entry["dtype"] = "BF16" if target.parent.name != "optimizer" else "F32"
    elif kind == 3:
        entry["data_offsets"] = draw.choice(
            ([0, draw.choice(HUGE)], [draw.choice(HUGE), 0], [0], [], "ab", None, [0, 0])
        )
    elif kind == 4:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin + draw.choice((-4, 4)), end + 4]
    elif kind == 5:
        del header[name]
    elif kind == 6:
        header["another"] = dict(entry)
    elif kind == 7:
        header[name + "x"] = header.pop(name)
    else:
        header["__metadata__"] = draw.choice(
            ([], "x", {"DCP_SHARDING_INFO": "[" * 100_000}, {"DCP_SHARDING_INFO": "{}"}, {"DCP_SHARDING_INFO": 5},
             {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [2**62] * len(entry["shape"])}})})
        )  # fmt: skip
    join(target, json.dumps(header).encode(), data)


def hostile_header_text(draw: random.Random, path: Path) -> None:
    target = path / draw.choice(TENSOR_FILES)
    header, data = split(target)
    text = json.dumps(header).encode()
    name = next(name for name in header if name != "__metadata__")
    twice = text[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]
    deep = b"[" * draw.choice((2_000, 300_000, 10_000_000))
    texts = (
        deep,
        b'{"a":' * 100_000,
        b"",
        b"{}",
        b"[]",
        b"\xff" * 50,
        text[:-1],
        twice,
        text.replace(b"F32", b"F3\x00"),
    )
    join(target, draw.choice(texts), data)


def hostile_header_length(draw: random.Random, path: Path) -> None:
    target = path / draw.choice(TENSOR_FILES)
    content = bytearray(target.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    content[:8] = struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, len(content), 2**40, 2**63, 2**64 - 1)))
    target.write_bytes(content)


def huge_sparse_file(draw: random.Random, path: Path) -> None:
    """A file as large as a false header says; it takes no room on the disk, but would in memory."""
    target = path / draw.choice(TENSOR_FILES)
    header, _ = split(target)
    name = draw.choice([name for name in header if name != "__metadata__"])
    size = 2**28
    item = 4 if header[name]["dtype"] == "F32" else 2
    text = json.dumps({name: {"dtype": header[name]["dtype"], "shape": [size // item], "data_offsets": [0, size]}})
    join(target, text.encode(), b"")
    os.truncate(target, target.stat().st_size + size)


def link_out(draw: random.Random, path: Path) -> None:
    """A link to a true copy outside: even what is right there is not followed."""
    name = draw.choice((*READ, *PARTS, "manifest.json"))
    outside = path.with_name("outside")
    shutil.rmtree(outside, ignore_errors=True)
    shutil.copytree(path, outside)
    target = path / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    target.symlink_to(draw.choice((outside / name, Path("/dev/zero"), Path("/etc/passwd"), target)))


def pipe(draw: random.Random, path: Path) -> None:
    target = path / draw.choice((*READ, "manifest.json"))
    target.unlink()
    os.mkfifo(target)


def hostile_manifest(draw: random.Random, path: Path) -> None:
    manifest = path / "manifest.json"
    content = json.loads(manifest.read_text())
    facts = {"bytes": 0, "sha256": "0" * 64}
    names = (
        "../step-2/state.json",
        "/etc/passwd",
        "a/../../x",
        "..",
        ".",
        "",
        "a\x00b",
        "x" * 5000,
        "\ud800",
        "model",
        "a" * 300,
    )
    kind = draw.randrange(6)
    if kind == 0:
        content["files"][draw.choice(names)] = draw.choice(
            (facts, None, [], {"bytes": draw.choice(HUGE), "sha256": ""})
        )
    elif kind == 1:
        del content["files"][draw.choice(READ)]
    elif kind == 2:
        content["files"][draw.choice(READ)]["bytes"] = draw.choice((*HUGE, None, 1.5, "7", True))
    elif kind == 3:
        content["files"] = draw.choice(([], None, {}, "x"))
    elif kind == 4:
        content["schema"] = draw.choice((0, 2, -1, None, "1", 10**30))
    else:
        manifest.write_text(draw.choice(("[" * 100_000, " " * 2**21, "", "{", "7" * 5000)))
        return
    manifest.write_text(json.dumps(content))


BY_THE_MANIFEST: list[Mutation] = [
    flip_bits, truncate, append, remove, remove_a_folder, swap, take_a_file_of_another_step, replace_by_zeros,
    link_out, pipe, hostile_manifest,
]  # fmt: skip
BY_THE_PARSERS: list[Mutation] = [
    take_all_files_of_another_step, extra_file, other_schema, hostile_state, hostile_random, hostile_stability,
    state_without,
    hostile_json,
    hostile_header, hostile_header_text, hostile_header_length, huge_sparse_file,
]  # fmt: skip
MUTATIONS = [*BY_THE_MANIFEST, *BY_THE_PARSERS]


def change_state(path: Path, **changes: Any) -> None:
    state = json.loads((path / "state.json").read_text()) | changes
    (path / "state.json").write_text(json.dumps(state))


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def join(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def peak(*, forget: bool = False) -> int:
    """Bytes of this process at their most, of Python and of all libraries; with `forget`, since now."""
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: the most of the whole process, which never falls
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def names_a_file_of(path: Path, message: str) -> bool:
    first = message.splitlines()[0]
    return str(path) in first


def mutate_and_load(victim: Victim, numbers: Iterator[int] | range) -> dict[str, int]:
    """How often each mutation was refused."""
    refused = dict.fromkeys((mutation.__name__ for mutation in MUTATIONS), 0)
    victim.restore()
    assert victim.loads_the_same()
    tracemalloc.start()
    try:
        for number in numbers:
            draw, mutation = random.Random(number), MUTATIONS[number % len(MUTATIONS)]
            victim.restore()
            mutation(draw, victim.path)
            if mutation in BY_THE_PARSERS:
                write_manifest(victim.path)
            tracemalloc.reset_peak()
            base, before = tracemalloc.get_traced_memory()[0], peak(forget=True)
            told = f"mutation {number}, {mutation.__name__}"
            try:
                assert victim.loads_the_same(), told
            except UserError as error:
                refused[mutation.__name__] += 1
                assert names_a_file_of(victim.path, str(error)), (told, str(error))
                assert f"tessera train --resume {victim.earlier}" in str(error), (told, str(error))
            assert tracemalloc.get_traced_memory()[1] - base < ROOM, told
            assert peak() - before < ROOM, told
    finally:
        tracemalloc.stop()
        victim.restore()
    return refused


def test_a_mutated_checkpoint_is_refused_or_loads_the_same_values(victim: Victim) -> None:
    refused = mutate_and_load(victim, range(3 * len(MUTATIONS)))
    assert all(count > 0 for count in refused.values()), refused


@pytest.mark.slow
def test_a_thousand_mutated_checkpoints_are_refused_or_load_the_same_values(victim: Victim) -> None:
    refused = mutate_and_load(victim, range(1000, 1000 + 46 * len(MUTATIONS)))
    may_be_harmless = {"extra_file"}
    assert all(count > 40 or name in may_be_harmless for name, count in refused.items()), refused


def test_where_no_checkpoint_before_it_is_whole_that_is_said(victim: Victim) -> None:
    (victim.path / "state.json").unlink()
    kept = (victim.earlier / "manifest.json").read_bytes()
    (victim.earlier / "manifest.json").write_text("{}")
    try:
        with pytest.raises(UserError, match=r"is missing.*\nno checkpoint before it is whole; begin again"):
            victim.loaded()
    finally:
        (victim.earlier / "manifest.json").write_bytes(kept)
        victim.restore()


def test_the_way_back_of_a_comparisons_arm_is_the_comparisons_own(victim: Victim, tmp_path: Path) -> None:
    shutil.copytree(victim.run.path, tmp_path / "both" / "arms" / "fp8")
    (tmp_path / "both" / "comparison.json").write_text("{}")
    run = RunFolder.open(tmp_path / "both" / "arms" / "fp8")
    path = run.checkpoint_path(4)
    told = f"remove {path}, and go on from step 2 with:\n  tessera compare --resume {(tmp_path / 'both').resolve()}"
    assert way_back(run, path) == told
    assert way_back(run, run.checkpoint_path(2)).startswith("no checkpoint before it is whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("hidden_size = 32", "hidden_size = 1048576"), "needs"),
        (("vocab_size = 320", "vocab_size = 1099511627776"), "needs"),
        (("num_hidden_layers = 2", "num_hidden_layers = 100000"), "needs"),
        (("[model]", "x = " + "[" * 100_000 + "\n[model]"), "nested too deeply"),
    ],
)
def test_sampling_allocates_nothing_by_a_recipe_that_its_weights_do_not_bear_out(
    change: tuple[str, str], words: str, victim: Victim
) -> None:
    text = (victim.path / "recipe.toml").read_text()
    assert change[0] in text
    (victim.path / "recipe.toml").write_text(text.replace(*change, 1))
    write_manifest(victim.path)
    before = peak(forget=True)
    try:
        with pytest.raises(UserError, match=words) as error:
            make_sample(victim.path, "def", 1, 0.0, 1.0, 0)
    finally:
        victim.restore()
    assert str(victim.path) in str(error.value)
    assert peak() - before < ROOM


def test_sampling_refuses_a_large_recipe_and_averages_that_the_manifest_does_not_name(victim: Victim) -> None:
    manifest = json.loads((victim.path / "manifest.json").read_text())
    del manifest["files"][f"ema/{TENSORS}"]
    (victim.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"does not list ema/{TENSORS}"):
        make_sample(victim.path, "def", 1, 0.0, 1.0, 0, ema=True)
    victim.restore()
    (victim.path / "recipe.toml").write_text("#" * 2**21)
    write_manifest(victim.path)
    with pytest.raises(UserError, match=r"recipe\.toml: has 2097152 bytes"):
        verify_checkpoint(victim.path)
    victim.restore()


def test_a_checkpoint_of_an_earlier_course_is_passed_over_and_a_damaged_one_is_not(
    victim: Victim, tmp_path: Path
) -> None:
    """Taken back to step 2, the run's events end there: going on from step 4 would leave a hole in them."""
    shutil.copytree(victim.run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    assert checkpoint.latest_to_resume(run) == run.checkpoint_path(4)
    offset = json.loads((run.checkpoint_path(2) / "state.json").read_text())["event_offset"]
    os.truncate(run.events_path, offset)
    assert checkpoint.latest_to_resume(run) == run.checkpoint_path(2)
    (run.checkpoint_path(4) / "state.json").write_text("{}")
    assert checkpoint.latest_to_resume(run) == run.checkpoint_path(4)
    shutil.rmtree(run.checkpoint_path(4))
    run.events_path.unlink()
    assert checkpoint.latest_to_resume(run) == run.checkpoint_path(2)
    shutil.rmtree(run.checkpoint_path(2))
    assert checkpoint.latest_to_resume(run) is None
