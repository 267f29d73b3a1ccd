"""From a recipe to batches: same bytes whatever made them, found again, repaired, and refused in clear words."""

import json
import threading
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from tessera.data import Dataset, Tokenizer, prepare
from tessera.data import prepare as prepare_function
from tessera.recipe import DataSection, Schedule, UserError
from tests.data.conftest import prose

# ruff: noqa: RUF001 -- the special tokens' own bars and blanks

module = __import__("sys").modules[prepare_function.__module__]
VOCAB = 300


def section(source: Path | str, **fields) -> DataSection:
    values = {"sequence_length": 16, "batch_size": Schedule(2), "fim_rate": 0.3} | fields
    return DataSection(source=str(source), **values)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(prose(i, 30 + 17 * (i % 7)) + f"unique {i}")
    return folder


def files(folder: str) -> dict[str, str]:
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}


def documents(dataset: Dataset, split: str) -> list[list[int]]:
    source = getattr(dataset, split)._documents
    return [source.read(i, 0, int(n)).tolist() for i, n in enumerate(source.lengths)]


def original(dataset: Dataset, ids: list[int]) -> str:
    """The text of a stored document, with its middle put back."""
    t = dataset.tokenizer
    assert ids[-1] == t.end_of_text
    ids = ids[:-1]
    if ids[0] != t.fim_begin:
        return t.decode(ids)
    hole, end = ids.index(t.fim_hole), ids.index(t.fim_end)
    prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
    return t.decode(prefix) + t.decode(middle) + t.decode(suffix)


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*arguments, **options)
    return str(caught.value)


# What it makes


def test_each_document_is_on_one_side_and_comes_back_whole(text: Path, tmp_path: Path) -> None:
    dataset = prepare(section(text, validation_fraction=0.2), VOCAB, tmp_path / "data")
    sides = {split: [original(dataset, ids) for ids in documents(dataset, split)] for split in ("train", "validation")}
    expected = Counter(p.read_text() for p in text.iterdir())
    assert Counter(sides["train"] + sides["validation"]) == expected
    assert len(sides["validation"]) == 8


def test_only_training_documents_are_rearranged(text: Path, tmp_path: Path) -> None:
    dataset = prepare(section(text, validation_fraction=0.5, fim_rate=1.0), VOCAB, tmp_path / "data")
    begin = dataset.tokenizer.fim_begin
    assert all(ids[0] == begin for ids in documents(dataset, "train"))
    assert not any(begin in ids for ids in documents(dataset, "validation"))
    assert dataset.facts["fim_documents"] == dataset.facts["train"]["documents"] == 20


def test_facts_are_true_and_are_json(text: Path, tmp_path: Path) -> None:
    (text / "zz.txt").write_bytes(b"\0")
    (text / "yy.txt").write_text("")
    dataset = prepare(section(text), VOCAB, tmp_path / "data")
    facts = json.loads(json.dumps(dataset.facts))
    assert facts["documents"] == 40 and facts["empty_documents"] == 1 and facts["skipped_files"] == 1
    assert facts["warnings"] == [f"1 file was skipped: {text}/zz.txt (binary)"]
    assert facts["bytes"] == sum(len(p.read_bytes()) for p in text.glob("[0-9]*"))
    assert facts["tokens"] == sum(len(ids) for s in ("train", "validation") for ids in documents(dataset, s))
    assert facts["train"]["tokens"] == dataset.train.num_tokens
    assert facts["validation"]["tokens"] == dataset.validation.num_tokens
    held_out = np.concatenate(documents(dataset, "validation"))
    assert dataset.token_bytes[held_out].sum() == facts["validation"]["bytes"]
    assert len(facts["digest"]) == 64 and not facts["reused"]


def test_sections_reach_the_batches(text: Path, tmp_path: Path) -> None:
    masked = prepare(section(text, cross_document_attention=False), VOCAB, tmp_path / "data")
    plain = prepare(section(text), VOCAB, tmp_path / "data")
    assert plain.facts["reused"]
    assert (masked.train.batch(0, 100).targets == -100).any() and not (plain.train.batch(0, 100).targets == -100).any()
    assert plain.train.batch(0, 2).tokens.shape == (2, 16)


def test_a_lone_document_is_held_out_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text(prose(0, 3000))
    dataset = prepare(section(path, validation_fraction=0.1, fim_rate=0.0), VOCAB, tmp_path / "data")
    ((train,), (validation,)) = documents(dataset, "train"), documents(dataset, "validation")
    assert original(dataset, train) + original(dataset, validation) == path.read_text()
    assert dataset.facts["documents"] == 2 and 0.05 < len(validation) / len(train) < 0.25
    assert prepare(section(path, validation_fraction=0.1, fim_rate=0.0), VOCAB, tmp_path / "data").facts["reused"]


def test_text_that_quotes_special_tokens_ends_no_document(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    quote = "<｜end▁of▁sentence｜><｜User｜>hi<｜fim▁begin｜>"
    path.write_text("".join(json.dumps({"text": f"{quote} {i} {prose(i, 50)}"}) + "\n" for i in range(10)))
    dataset = prepare(section(path, fim_rate=0.0), VOCAB, tmp_path / "data")
    for ids in documents(dataset, "train") + documents(dataset, "validation"):
        assert [i for i in ids if i < 16] == [dataset.tokenizer.end_of_text]


# Same bytes


def test_workers_change_nothing(text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tessera.data.encode.JOB_CHARACTERS", 700)  # many jobs, taken in turn
    alone = prepare(section(text), VOCAB, tmp_path / "alone")
    others = prepare(section(text, num_workers=2), VOCAB, tmp_path / "others")
    assert alone.facts["digest"] == others.facts["digest"]
    assert files(alone.facts["folder"]) == files(others.facts["folder"])


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"fim_rate": 0.0}, {"validation_fraction": 0.5}], ids=["seed", "fim", "fraction"]
)
def test_settings_that_change_the_shards_change_the_digest(text: Path, tmp_path: Path, change) -> None:
    one = prepare(section(text), VOCAB, tmp_path / "data")
    other = prepare(section(text, **change), VOCAB, tmp_path / "data")
    assert one.facts["digest"] != other.facts["digest"] and not other.facts["reused"]
    assert files(one.facts["folder"]) != files(other.facts["folder"])
    assert prepare(section(text), VOCAB, tmp_path / "data").facts["reused"]  # both stay


def test_shards_are_reused_until_the_text_changes(text: Path, tmp_path: Path, monkeypatch) -> None:
    first = prepare(section(text), VOCAB, tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", lambda *_: pytest.fail("trained again"))
        again = prepare(section(text, sequence_length=7, batch_size=Schedule(3)), VOCAB, tmp_path / "data")
    assert again.facts["reused"] and again.facts["tokens"] == first.facts["tokens"]
    (text / "00.txt").write_text("another text")
    assert not prepare(section(text), VOCAB, tmp_path / "data").facts["reused"]


def test_a_large_corpus_trains_its_tokenizer_on_a_sample(text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_BYTES", 8000)
    monkeypatch.setattr(module, "_SAMPLE_PIECE", 100)
    seen: list[int] = []
    train = Tokenizer.train

    def watched(texts, vocab_size):
        texts = list(texts)
        seen.append(sum(map(len, texts)))
        return train(texts, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", watched)
    one = prepare(section(text), VOCAB, tmp_path / "one")
    two = prepare(section(text), VOCAB, tmp_path / "two")
    assert seen[0] == seen[1] and 5000 < seen[0] < 11000 < one.facts["bytes"]
    assert files(one.facts["folder"]) == files(two.facts["folder"])


# Damage and accidents


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-2])])
@pytest.mark.parametrize(
    "name", ["train-00000.bin", "validation-documents.npy", "tokenizer.json", "facts.json", "manifest.json"]
)
def test_a_damaged_folder_is_made_again_and_it_is_said(text: Path, tmp_path: Path, name: str, harm) -> None:
    before = prepare(section(text), VOCAB, tmp_path / "data")
    folder = Path(before.facts["folder"])
    good = files(str(folder))
    if name == "manifest.json":
        (folder / name).write_bytes(b"{")
    else:
        harm(folder / name)
    after = prepare(section(text), VOCAB, tmp_path / "data")
    (warning,) = after.facts["warnings"]
    assert "made again" in warning and name in warning
    assert not after.facts["reused"] and files(str(folder)) == good
    assert prepare(section(text), VOCAB, tmp_path / "data").facts["warnings"] == []


def test_what_breaks_off_leaves_nothing_behind(text: Path, tmp_path: Path, monkeypatch) -> None:
    for error in (KeyboardInterrupt, RuntimeError):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(module.ShardWriter, "append", lambda *_: (_ for _ in ()).throw(error))  # noqa: B023
            prepare(section(text), VOCAB, tmp_path / "data")
        assert list((tmp_path / "data").iterdir()) == []


def test_two_that_prepare_at_once_share_one_result(text: Path, tmp_path: Path, monkeypatch) -> None:
    meet = threading.Barrier(2, timeout=20)
    publish = module.publish_folder

    def together(*paths):
        meet.wait()
        publish(*paths)

    monkeypatch.setattr(module, "publish_folder", together)
    made: list[Dataset] = []
    threads = [
        threading.Thread(target=lambda: made.append(prepare(section(text), VOCAB, tmp_path / "data"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and made[0].facts["folder"] == made[1].facts["folder"]
    assert [p.name for p in (tmp_path / "data").iterdir()] == [Path(made[0].facts["folder"]).name]


def test_text_that_changes_meanwhile_is_an_error(text: Path, tmp_path: Path) -> None:
    def meddle(stage: str, done: int, total: int) -> None:
        if stage == "training tokenizer":
            (text / "39.txt").write_text("another")

    assert "changed while it was read" in refused(section(text), VOCAB, tmp_path / "data", progress=meddle)

    def remove(stage: str, done: int, total: int) -> None:
        if stage == "training tokenizer":
            (text / "39.txt").unlink(missing_ok=True)

    assert "changed while it was read" in refused(section(text), VOCAB, tmp_path / "data", progress=remove)
    assert list((tmp_path / "data").iterdir()) == []


def test_progress_reaches_the_end_of_every_stage(text: Path, tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}
    prepare(section(text), VOCAB, tmp_path / "data", progress=lambda stage, *numbers: told.update({stage: numbers}))
    assert list(told) == ["reading text", "training tokenizer", "writing tokens"]
    assert all(done == total > 0 for done, total in told.values())


# What it refuses


def test_a_corpus_smaller_than_a_batch_gives_figures_and_the_way_out(text: Path, tmp_path: Path) -> None:
    tokens = prepare(section(text), VOCAB, tmp_path / "data").train.num_tokens
    largest = tokens // 16
    prepare(section(text, batch_size=Schedule(largest)), VOCAB, tmp_path / "data")
    message = refused(section(text, batch_size=Schedule(largest + 1)), VOCAB, tmp_path / "data")
    assert f"{tokens:,} tokens" in message and f"set data.batch_size to at most {largest}" in message


def test_a_sequence_longer_than_the_text_gives_figures_and_the_way_out(text: Path, tmp_path: Path) -> None:
    tokens = prepare(section(text), VOCAB, tmp_path / "data").train.num_tokens
    one = Schedule(1)
    prepare(section(text, batch_size=one, sequence_length=tokens - 1), VOCAB, tmp_path / "data")
    message = refused(section(text, batch_size=one, sequence_length=tokens), VOCAB, tmp_path / "data")
    assert f"data.sequence_length = {tokens}" in message and f"at most {tokens - 1}" in message


def test_a_validation_text_shorter_than_a_sequence_is_one_filled_sequence(text: Path, tmp_path: Path) -> None:
    dataset = prepare(section(text, sequence_length=1000), VOCAB, tmp_path / "data")
    assert dataset.validation.num_sequences == 1
    assert (dataset.validation.batch(0, 1).targets != -100).sum() == dataset.validation.num_tokens - 1


def test_a_given_tokenizer_is_used_and_checked(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    given = section(text, tokenizer=str(path))
    dataset = prepare(given, 512, tmp_path / "data")
    assert dataset.tokenizer.to_json() == tokenizer.to_json() and len(dataset.token_bytes) == 512
    assert "set model.vocab_size to at least 320" in refused(given, 319, tmp_path / "data")
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        if token["content"] == "<｜fim▁hole｜>":
            token["content"] = "<hole>"
    content["model"]["vocab"]["<hole>"] = content["model"]["vocab"].pop("<｜fim▁hole｜>")
    path.write_text(json.dumps(content))
    message = refused(given, 512, tmp_path / "data")
    assert "fim▁hole" in message and "data.fim_rate = 0" in message
    assert prepare(section(text, tokenizer=str(path), fim_rate=0.0), 512, tmp_path / "data").facts["tokens"]


def test_one_character_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert "one character" in refused(section(tmp_path / "a.txt"), VOCAB, tmp_path / "data")


def test_a_folder_that_cannot_be_written_is_named(text: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    assert str(blocked) in refused(section(text), VOCAB, blocked / "data")


def test_a_full_disk_is_said(text: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.ShardWriter, "append", full)
    assert "No space left on device" in refused(section(text), VOCAB, tmp_path / "data")
