"""Encoding in processes: order is kept, memory bounded, and a dead worker is an error in words."""

import os
from pathlib import Path

import pytest

from tessera.data import Tokenizer, encode
from tessera.data.encode import encode_documents
from tessera.recipe import UserError
from tests.data.conftest import prose


def test_documents_keep_their_order_and_end_with_end_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t.json")
    texts = [prose(i, i % 5) for i in range(50)]
    found = [ids.tolist() for ids in encode_documents(((t,) for t in texts), tmp_path / "t.json", 0)]
    assert found == [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]


def test_jobs_are_read_only_as_they_are_needed(tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encode, "JOB_CHARACTERS", 10)
    tokenizer.save(tmp_path / "t.json")
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield ("a text of twenty....",)

    stream = encode_documents(endless(), tmp_path / "t.json", 2)
    for _ in range(5):
        next(stream)
    stream.close()
    assert read <= 5 + 2 * 2


def kill(*_: object) -> None:
    os._exit(9)


def test_a_worker_that_dies_is_an_error_in_words(tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encode, "_encode", kill)
    with pytest.raises(UserError, match=r"data\.num_workers = 1: a worker process ended early"):
        list(encode_documents([("text",)], tmp_path / "t.json", 1))
