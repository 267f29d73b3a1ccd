"""Lossless, deterministic, deaf to special tokens in text, and cut as llama.cpp's "deepseek-v3" cuts."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tessera.data import Tokenizer
from tessera.data import tokenizer as module
from tessera.data.tokenizer import END_OF_TEXT, FIM_BEGIN, SMALLEST, SPECIAL_TOKENS, pieces
from tessera.recipe import UserError
from tests.data.conftest import prose

# ruff: noqa: RUF001 -- the special tokens' own bars and blanks

# The corners of the three patterns: digits, both kana, ideographs at the ends of the range, marks, controls.
LETTERS = (
    "aZ\xe9\u4e00\u9fa5\u9fa6\u3042\u30ab\u30fc1\uff12 3\n\r\t \x0b\xa0\u2028"
    "!,.<>_$\u20ac'`~\\]^\u0301\u0e31\U0001f600\u200d"
)
RUNS = ["12", "123", "1234", "1234567", "１２３４", "\n \n", "\r\n", "  ", "   x", ".foo", " ...\n", "かナ漢", "don't"]
messy = st.lists(st.sampled_from([*LETTERS, *RUNS]), max_size=40).map("".join)


def published_pieces(text: str) -> list[str]:
    """DeepSeek-V3's tokenizer.json, pattern after pattern with another engine: matches and what lies between."""
    parts = [text]
    for pattern in (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ):
        cut = []
        for part in parts:
            end = 0
            for match in regex.finditer(pattern, part):
                cut += [part[end : match.start()], match.group()]
                end = match.end()
            cut.append(part[end:])
        parts = [part for part in cut if part]
    return parts


def slow_bpe(tokenizer: Tokenizer, text: str) -> list[int]:
    """Each piece from its bytes, the merge that was learnt first before all others."""
    model = json.loads(tokenizer.to_json())["model"]
    rank = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    letters = byte_letters()
    ids = []
    for piece in published_pieces(text):
        symbols = [letters[byte] for byte in piece.encode()]
        while pairs := [(rank[p], i) for i, p in enumerate(pairwise(symbols)) if p in rank]:
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        ids += [model["vocab"][symbol] for symbol in symbols]
    return ids


def byte_letters() -> list[str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


@given(messy)
@settings(deadline=None)
def test_text_is_cut_by_the_published_patterns(tokenizer: Tokenizer, text: str) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    bounds = [bound for _, bound in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[a:b] for a, b in bounds] == published_pieces(text)


@given(messy | st.builds(prose, st.integers(0, 99), st.integers(0, 30)))
@settings(deadline=None)
def test_ids_are_those_of_a_slow_bpe(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == slow_bpe(tokenizer, text)


@given(st.text())
@settings(deadline=None)
def test_text_comes_back_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "<", "｜", "\n"]), max_size=8).map("".join))
@settings(deadline=None)
def test_a_special_tokens_spelling_in_text_is_ordinary_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)
    assert tokenizer.decode(ids) == text
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode(text) == ids


def test_special_tokens_have_deepseeks_spellings_and_fixed_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in range(8)] == [
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜fim▁hole｜>",
        "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>",
    ]  # fmt: skip
    t = tokenizer
    ids = [
        t.begin_of_text, t.end_of_text, t.padding, t.fim_hole, t.fim_begin, t.fim_end, t.user, t.assistant,
    ]  # fmt: skip
    assert ids == list(range(8))
    assert not t.token_bytes()[: len(SPECIAL_TOKENS)].any() and t.token_bytes()[len(SPECIAL_TOKENS) :].all()


def test_a_models_larger_vocabulary_has_tokens_that_stand_for_nothing(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_bytes(512)
    assert len(lengths) == 512 and not lengths[320:].any() and lengths[319]
    assert tokenizer.decode([319, 400, 511]) == tokenizer.decode([319])


# Long texts


@given(
    st.lists(st.sampled_from(["\nx", "\n", "\n ", " ", "a", "bc", "(", "1", "漢", "\r", "\t"]), max_size=30),
    st.integers(1, 12),
)
@settings(deadline=None)
def test_pieces_are_cut_only_where_no_token_reaches_across(parts: list[str], size: int) -> None:
    text, start, expected, forced = "".join(parts), 0, [], False
    while len(text) - start > size:
        places = [k for k in range(1, size + 1) if text[start + k - 1] == "\n" and not text[start + k].isspace()]
        forced |= not places
        expected.append(text[start : start + max(places, default=size)])
        start += len(expected[-1])
    expected += [text[start:]] if text[start:] else []
    assert list(pieces(text, size)) == expected
    if not forced:
        assert [part for piece in expected for part in published_pieces(piece)] == published_pieces(text)


def test_a_piece_without_lines_is_cut_all_the_same() -> None:
    assert list(pieces("x" * 100, 40)) == ["x" * 40, "x" * 40, "x" * 20]
    assert list(pieces("\n" * 100, 40)) == ["\n" * 40, "\n" * 40, "\n" * 20]
    assert list(pieces("", 40)) == []


@pytest.mark.parametrize("text", [" " * 3_000_000, "\n \t" * 500_000, "é" * 1_500_000, "7-" * 600_000])
def test_megabytes_without_a_word_or_a_line_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\udce9")


# Training


def test_training_gives_exactly_the_tokens_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320 == len(json.loads(tokenizer.to_json())["model"]["vocab"])
    assert Tokenizer.train(["no merge at all"], SMALLEST).vocab_size == SMALLEST


def test_training_is_the_same_in_every_process(tokenizer: Tokenizer) -> None:
    script = (
        "import sys, json; from tessera.data import Tokenizer\n"
        "sys.stdout.write(Tokenizer.train(json.load(sys.stdin), 320).to_json())"
    )
    texts = json.dumps([prose(seed, 400) for seed in range(20)])
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    run = subprocess.run(
        [sys.executable, "-c", script], input=texts, capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout == tokenizer.to_json()


def test_a_vocabulary_beyond_the_text_says_what_it_reached_and_what_to_set() -> None:
    with pytest.raises(UserError) as caught:
        Tokenizer.train(["abab abab cdcd"], 4096)
    reached = int(str(caught.value).split("only ")[1].split()[0])
    assert f"set model.vocab_size to at most {reached}" in str(caught.value)
    assert Tokenizer.train(["abab abab cdcd"], reached).vocab_size == reached


def test_a_pair_seen_once_makes_no_token() -> None:
    with pytest.raises(UserError, match=f"only {SMALLEST} tokens"):
        Tokenizer.train(["every pair but once"[:7]], SMALLEST + 1)


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size = 271.*at least"):
        Tokenizer.train(["text"], SMALLEST - 1)


# Files


def test_a_saved_tokenizer_is_the_same_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.to_json() == tokenizer.to_json() and again.vocab_size == tokenizer.vocab_size
    assert (again.token_bytes() == tokenizer.token_bytes()).all()


def foreign(**change) -> tokenizers.Tokenizer:
    """A byte-level BPE as another library would make it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=change.pop("prefix", False))
    backend.decoder = decoders.ByteLevel()
    if "normalizer" in change:
        backend.normalizer = change.pop("normalizer")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, **change)
    backend.train_from_iterator([prose(0, 500)], trainer)
    return backend


ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def test_chat_tokens_that_a_file_calls_ordinary_are_special_all_the_same(tmp_path: Path) -> None:
    backend = foreign(initial_alphabet=ALPHABET, special_tokens=[END_OF_TEXT])
    backend.add_tokens(["<｜User｜>", "<think>"])  # DeepSeek-V3's own file has them as ordinary added tokens
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.user not in loaded.encode("a<｜User｜>b") and loaded.end_of_text not in loaded.encode(END_OF_TEXT)
    think = loaded.encode("<think>")
    assert len(think) == 1 and loaded.token_bytes()[think[0]] == 7 and not loaded.token_bytes()[loaded.user]
    with pytest.raises(UserError, match="fim▁begin"):
        _ = loaded.fim_begin


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (lambda: foreign(initial_alphabet=ALPHABET), "has no token"),
        (lambda: foreign(special_tokens=[END_OF_TEXT]), "of the 256 bytes"),
        (lambda: foreign(initial_alphabet=ALPHABET, special_tokens=[END_OF_TEXT], prefix=True), "give back"),
        (
            lambda: foreign(
                initial_alphabet=ALPHABET, special_tokens=[END_OF_TEXT], normalizer=normalizers.Lowercase()
            ),
            "give back",
        ),
        (lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "WordLevel model"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path, backend, reason: str) -> None:
    path = tmp_path / "tokenizer.json"
    backend().save(str(path))
    with pytest.raises(UserError, match=reason) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"added_tokens": 3}', b'{"added_tokens": []}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        Tokenizer.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read: No such file"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_markers_are_the_ones_that_inference_engines_use() -> None:
    assert FIM_BEGIN == "<\uff5cfim\u2581begin\uff5c>" and module.LLAMA_CPP_NAME == "deepseek-v3"
