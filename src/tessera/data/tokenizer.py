"""Text to token ids and back: byte-level BPE in the files of Hugging Face `tokenizers`.

Text is first cut by DeepSeek-V3's three patterns (runs of up to three digits; Chinese and Japanese; words,
punctuation and blanks, where punctuation may take the letters behind it and line ends), then each piece is merged
from its UTF-8 bytes. The patterns are the published ones, which llama.cpp knows as "deepseek-v3", so that a model
exported to GGUF cuts text in the same way. All 256 bytes are tokens, so every text has an encoding and
decode(encode(text)) == text.

The special tokens have DeepSeek-V3's spellings, so that its chat templates and tools work; ours come first, from
id 0, with a few reserved ones behind them. They are put in as ids. In text they are ordinary characters: a document
that quotes "<｜end▁of▁sentence｜>" cannot end itself, and a user's message cannot speak for the assistant.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from tessera.recipe import UserError
from tessera.store import write_atomic

# ruff: noqa: RUF001 -- the bars and blanks of the special tokens are DeepSeek's, U+FF5C and U+2581

BEGIN_OF_TEXT = "<｜begin▁of▁sentence｜>"
END_OF_TEXT = "<｜end▁of▁sentence｜>"
PADDING = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
RESERVED = tuple(f"<｜place▁holder▁no▁{i}｜>" for i in range(8))
SPECIAL_TOKENS = (BEGIN_OF_TEXT, END_OF_TEXT, PADDING, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, *RESERVED)

# As in the tokenizer.json of deepseek-ai/DeepSeek-V3; llama.cpp: LLAMA_VOCAB_PRE_TYPE_DEEPSEEK3_LLM.
PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
LLAMA_CPP_NAME = "deepseek-v3"  # tokenizer.ggml.pre of a GGUF file

SMALLEST = 256 + len(SPECIAL_TOKENS)  # tokens of a vocabulary without a single merge
_MIN_FREQUENCY = 2  # a pair seen once is a quotation, not a token
# The longest text that is encoded in one go: the regular expressions give up on a run of several million blanks.
_PIECE = 1 << 20
_GROUP = 1 << 21  # characters at work at once: an encoding takes some hundred bytes a token while it is made
_PROBE = "Two  words,\n\tdef π_9(x): return 12345 + '漢字かな'\r\n\n  " + END_OF_TEXT + USER


class Tokenizer:
    """A trained vocabulary; made by `train`, `load` or `from_json`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # a special token's spelling in text is text
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A vocabulary of exactly `vocab_size` tokens from `texts`; equal texts in equal order give equal ids.

        Raises UserError where the texts do not support so many, or it is smaller than SMALLEST.
        """
        if vocab_size < SMALLEST:
            raise UserError(
                f"model.vocab_size = {vocab_size}: the 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
                f"alone are {SMALLEST}; set at least that"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=_MIN_FREQUENCY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
        if (reached := backend.get_vocab_size(with_added_tokens=True)) < vocab_size:
            raise UserError(
                f"model.vocab_size = {vocab_size}: the corpus supports only {reached} tokens (each merged from a "
                f"pair that occurs at least {_MIN_FREQUENCY} times)\n"
                f"  set model.vocab_size to at most {reached}, or give more text in data.source"
            )
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """A tokenizer.json: byte-level BPE with our end of text. Raises UserError naming what it lacks."""
        try:
            text = path.read_bytes().decode()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is no tokenizer.json: not UTF-8 at byte {error.start}") from None
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json") -> "Tokenizer":
        """The tokenizer whose file holds `text`; `name` is what messages call it. Raises UserError."""
        try:
            content = json.loads(text)
            for token in content["added_tokens"]:
                # DeepSeek-V3's own file calls its FIM and chat tokens ordinary: they would be found in text.
                token["special"] = token["special"] or token["content"] in SPECIAL_TOKENS
            backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library's own errors are plain Exception
            raise UserError(f"{name}: is no tokenizer.json: {error}") from None
        _check(backend, content, name)
        tokenizer = cls(backend)
        if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
            raise UserError(
                f"{name}: does not give back the text it encodes, so its bits per byte would mean nothing; "
                "take one without a normalizer or a prefix space"
            )
        return tokenizer

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return str(self._backend.to_str(pretty=True))

    def save(self, path: Path) -> None:
        """Write tokenizer.json to `path`, atomically; raises UserError."""
        write_atomic(path, self.to_json())

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any special token; raises UserError for half a surrogate pair."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """`encode` of each text, as arrays; several threads share the work unless the process forbids it."""
        parts = [list(pieces(text)) for text in texts]
        arrays = []
        for group in _groups(piece for part in parts for piece in part):
            try:
                encodings = self._backend.encode_batch_fast(group, add_special_tokens=False)
            except TypeError:  # how the library says that a string has no UTF-8
                raise UserError("half a surrogate pair is no text, and has no tokens") from None
            arrays += [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        nothing, rest = np.empty(0, dtype=np.uint32), iter(arrays)
        return [np.concatenate([nothing, *(next(rest) for _ in part)]) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens appear as they are spelled, ids beyond the vocabulary as nothing, bytes
        that are no UTF-8 as U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token_bytes(self, vocab_size: int | None = None) -> NDArray[np.int64]:
        """Bytes of text that each token stands for, int64 [vocab_size or own size]; 0 for special and unused ids."""
        added = self._backend.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size if vocab_size is None else vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index not in added:
                lengths[index] = len(token)  # the byte-level alphabet has one character for each byte
            elif not added[index].special:
                lengths[index] = len(token.encode())
        return lengths

    def special(self, spelling: str) -> int:
        """The id of a special token; raises UserError if this vocabulary has none of that spelling."""
        index = self._backend.token_to_id(spelling)
        if index is None:
            raise UserError(f'the tokenizer has no token "{spelling}"; take one that has, or let it be trained')
        return int(index)

    @property
    def begin_of_text(self) -> int:
        return self.special(BEGIN_OF_TEXT)

    @property
    def end_of_text(self) -> int:
        return self.special(END_OF_TEXT)

    @property
    def padding(self) -> int:
        return self.special(PADDING)

    @property
    def fim_begin(self) -> int:
        return self.special(FIM_BEGIN)

    @property
    def fim_hole(self) -> int:
        return self.special(FIM_HOLE)

    @property
    def fim_end(self) -> int:
        return self.special(FIM_END)

    @property
    def user(self) -> int:
        return self.special(USER)

    @property
    def assistant(self) -> int:
        return self.special(ASSISTANT)


def pieces(text: str, size: int = _PIECE) -> Iterator[str]:
    """`text` in pieces of at most `size` characters, cut before a line that begins with a visible character.

    No pattern of ours reaches across such a place, so the ids are those of the whole text. A piece without one is
    cut at `size`, which may cost a token there.
    """
    start = 0
    while len(text) - start > size:
        stop = start + size
        while (line := text.rfind("\n", start, stop) + 1) > start and text[line].isspace():
            stop = line - 1
        end = line if line > start else start + size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _groups(parts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of about _GROUP characters, in order."""
    group: list[str] = []
    characters = 0
    for part in parts:
        group.append(part)
        characters += len(part)
        if characters >= _GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _check(backend: tokenizers.Tokenizer, content: dict[str, Any], name: str) -> None:
    kind = (content.get("model") or {}).get("type")
    if kind != "BPE":
        raise UserError(f"{name}: holds a {kind} model; tessera takes byte-level BPE")
    known = backend.get_vocab(with_added_tokens=False)
    if missing := sum(letter not in known for letter in pre_tokenizers.ByteLevel.alphabet()):
        raise UserError(f"{name}: lacks {missing} of the 256 bytes; tessera takes byte-level BPE")
    if backend.token_to_id(END_OF_TEXT) is None:
        raise UserError(f'{name}: has no token "{END_OF_TEXT}", which ends each document; add it as a special token')
