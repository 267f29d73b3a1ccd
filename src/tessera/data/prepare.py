"""From the [data] section of a recipe to a `Dataset`: done once, found again as long as nothing changes.

    <folder>/<first 16 digits of the digest>/
      tokenizer.json                                  trained on the training documents, or a copy of the given one
      {train,validation}-00000.bin, -documents.npy    see `tessera.data.shards`
      facts.json                                      counts, and the digest in full
      manifest.json                                   sizes and SHA-256 of the files above

The digest is over the documents, the tokenizer (its file, or how it is trained) and the settings that the shards
depend on; sequence length and batch size are not among them. Every call reads the corpus for its digest and the
shards for their hashes, a fraction of what it takes to make them, and so notices a changed text and a damaged disk.
A damaged folder is made again, which gives the same bytes, and `facts["warnings"]` says so. The folder is filled
under another name and renamed when complete; of two processes that prepare the same data at once, one keeps its work.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.batches import Batches
from tessera.data.corpus import Corpus, Progress, Scan, find_corpus, fingerprint, named, scan
from tessera.data.draws import below, draw
from tessera.data.encode import Parts, encode_documents
from tessera.data.fill_in_middle import chosen_documents, cut
from tessera.data.shards import ShardWriter, TokenDocuments, open_documents, token_type
from tessera.data.split import cut_in_two, held_out
from tessera.data.tokenizer import SPECIAL_TOKENS, Tokenizer, pieces
from tessera.recipe import DataSection, UserError
from tessera.store import publish_folder, sha256_file, verify_manifest

_SCHEMA = 1  # raised when the shards of the same text would be others
SPLITS = ("train", "validation")
# The tokenizer of a larger corpus is trained on a sample of it: 64 MB take about 20 seconds on one core.
SAMPLE_BYTES = 64_000_000
_SAMPLE_PIECE = 4096  # characters


@dataclass(frozen=True)
class Dataset:
    """What a run trains on and is measured on."""

    tokenizer: Tokenizer
    token_bytes: NDArray[np.int64]  # [V]: bytes of text that each token of the model stands for; specials 0
    train: Batches
    validation: Batches
    facts: dict[str, Any]  # digest, documents, tokens, bytes, ... as plain JSON values; see `prepare`


def prepare(section: DataSection, vocab_size: int, folder: Path, *, progress: Progress | None = None) -> Dataset:
    """Make the shards of `section` in `folder`, or find them there, and open them for a model of `vocab_size` tokens.

    `progress(stage, done, total)` is called now and then. The facts: digest, folder, reused, documents, tokens and
    bytes (of both splits, and of each in train and validation), fim_documents, empty_documents, skipped_files
    (a count), and warnings, sentences for the user.

    Raises UserError: no such source, no text in it, a broken line, too large a vocabulary, text too short for a
    batch or a sequence, a folder that cannot be written.
    """
    corpus = find_corpus(section.source, section.extensions, section.text_field)
    found = scan(corpus, progress)
    given = _given_tokenizer(section, vocab_size)
    texts = _Texts(corpus, found, section)
    digest = _digest(found.digest, section, vocab_size)
    place = folder / digest[:16]
    damage = _damage(place)
    reused = place.exists() and damage is None
    if not reused:
        _make(texts, section, vocab_size, given, digest, place, damage, progress)
    tokenizer = Tokenizer.load(place / "tokenizer.json")
    facts = json.loads((place / "facts.json").read_text())
    facts |= {
        "folder": str(place),
        "reused": reused,
        "empty_documents": found.empty,
        "skipped_files": len(found.skipped),
        "warnings": _warnings(found, damage),
    }
    dtype = token_type(tokenizer.vocab_size)
    train, validation = (open_documents(place, split, dtype) for split in SPLITS)
    _check_length(train, section)
    settings: dict[str, Any] = {
        "seed": section.seed,
        "end_of_text": tokenizer.end_of_text,
        "cross_document_attention": section.cross_document_attention,
    }
    return Dataset(
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes(vocab_size),
        train=Batches(train, section.sequence_length, **settings),
        validation=Batches(validation, section.sequence_length, endless=False, **settings),
        facts=facts,
    )


class _Texts:
    """The documents of a corpus with their side: those of the scan, or the two parts of a lone one."""

    def __init__(self, corpus: Corpus, found: Scan, section: DataSection) -> None:
        self._corpus, self._found, self._fraction = corpus, found, section.validation_fraction
        self.content, self.bytes, self._lone = found.content, found.bytes, len(found.content) == 1
        if self._lone:
            parts = [fingerprint(text) for _, text in self]
            self.content = np.array([key for key, _, _ in parts], dtype=np.uint64)
            self.bytes = np.array([size for _, size, _ in parts], dtype=np.int64)
            self.held_out = np.array([False, True])
        else:
            self.held_out = held_out(found.content, section.validation_fraction, section.seed)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """(index, document) in order. Raises UserError if the corpus is no longer the one that was scanned."""
        for i, (text, key) in enumerate(zip_longest(self._corpus.documents(), self._found.content.tolist())):
            if text is None or fingerprint(text)[0] != key:
                raise UserError("data.source: the text changed while it was read; run again when it is at rest")
            if not self._lone:
                yield i, text
            elif len(text) < 2:
                raise UserError("data.source: the whole text is one character; nothing can be held out of it")
            else:
                yield from enumerate(cut_in_two(text, self._fraction))


def _given_tokenizer(section: DataSection, vocab_size: int) -> Tokenizer | None:
    """The recipe's tokenizer, checked for what the recipe asks of it; None where one is to be trained."""
    if section.tokenizer is None:
        return None
    tokenizer = Tokenizer.load(Path(section.tokenizer))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer = {section.tokenizer}: has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size = {vocab_size}; set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    if section.fim_rate:
        try:
            _ = tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end
        except UserError as error:
            raise UserError(f"data.tokenizer = {section.tokenizer}: {error}, or set data.fim_rate = 0") from None
    return tokenizer


def _digest(corpus: str, section: DataSection, vocab_size: int) -> str:
    trained = {"vocab_size": vocab_size, "special": SPECIAL_TOKENS, "sample": SAMPLE_BYTES}
    identity = {
        "schema": _SCHEMA,
        "corpus": corpus,
        "tokenizer": sha256_file(Path(section.tokenizer)) if section.tokenizer else trained,
        "validation_fraction": section.validation_fraction,
        "fim_rate": section.fim_rate,
        "seed": section.seed,
    }
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _damage(place: Path) -> str | None:
    """What is wrong with a folder of shards; None if nothing is, or it is not there."""
    if not place.exists():
        return None
    try:
        verify_manifest(place)
    except UserError as error:
        return str(error)
    return None


def _make(
    texts: _Texts,
    section: DataSection,
    vocab_size: int,
    given: Tokenizer | None,
    digest: str,
    place: Path,
    damage: str | None,
    progress: Progress | None,
) -> None:
    """Fill a folder beside `place` and rename it. Raises UserError."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            partial = place.with_name(f"{place.name}-{secrets.token_hex(4)}.partial")
            partial.mkdir()
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            tokenizer = given or Tokenizer.train(_sample(texts, section.seed, progress), vocab_size)
            tokenizer.save(partial / "tokenizer.json")
            counts = _write_shards(texts, section, tokenizer, partial, progress)
            facts = json.dumps({"schema": _SCHEMA, "digest": digest, **counts}, indent=2)
            (partial / "facts.json").write_text(facts + "\n")
            if damage:
                shutil.rmtree(place)
            try:
                publish_folder(partial, place)
            except UserError:
                if not place.exists() or _damage(place):  # else another process was faster, with the same bytes
                    raise
    except OSError as error:
        raise UserError(f"{place.parent}: cannot be written: {error.strerror or error}; see data.cache") from error


def _sample(texts: _Texts, seed: int, progress: Progress | None) -> Iterator[str]:
    """The training documents, or, of more than SAMPLE_BYTES, pieces from everywhere in them."""
    total = int(texts.bytes[~texts.held_out].sum())
    done, number = 0, 0
    for i, text in texts:
        if texts.held_out[i]:
            continue
        if total <= SAMPLE_BYTES:
            yield text
        else:
            parts = list(pieces(text, _SAMPLE_PIECE))
            keys = np.arange(number, number + len(parts), dtype=np.uint64)
            chosen = below(draw(keys, seed, "sample"), SAMPLE_BYTES / total)
            yield from (part for part, take in zip(parts, chosen.tolist(), strict=True) if take)
            number += len(parts)
        done += int(texts.bytes[i])
        if progress:
            progress("training tokenizer", done, total)


def _write_shards(
    texts: _Texts, section: DataSection, tokenizer: Tokenizer, partial: Path, progress: Progress | None
) -> dict[str, Any]:
    """Encode every document into its split's shards; the counts, as facts."""
    dtype = token_type(tokenizer.vocab_size)
    rearranged = chosen_documents(texts.content, section.fim_rate, section.seed) & ~texts.held_out

    def documents() -> Iterator[Parts]:
        for i, text in texts:
            yield cut(text, int(texts.content[i]), section.seed) if rearranged[i] else (text,)

    total, done = int(texts.bytes.sum()), 0
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(partial, split, dtype)) for split in SPLITS]
        encoded = encode_documents(documents(), partial / "tokenizer.json", section.num_workers)
        for i, tokens in enumerate(encoded):
            writers[int(texts.held_out[i])].append(tokens)
            done += int(texts.bytes[i])
            if progress:
                progress("writing tokens", done, total)
    sides = {
        split: {
            "documents": int((texts.held_out == side).sum()),
            "tokens": writers[side].num_tokens,
            "bytes": int(texts.bytes[texts.held_out == side].sum()),
        }
        for side, split in enumerate(SPLITS)
    }
    both = {name: sides["train"][name] + sides["validation"][name] for name in ("documents", "tokens", "bytes")}
    return both | {"fim_documents": int(rearranged.sum())} | sides


def _warnings(found: Scan, damage: str | None) -> list[str]:
    warnings = []
    if found.skipped:
        count = len(found.skipped)
        warnings.append(f"{count} file{'s were' if count > 1 else ' was'} skipped: {named(found.skipped)}")
    if damage:
        warnings.append(f"token shards were damaged and made again: {damage.splitlines()[0]}")
    return warnings


def _check_length(train: TokenDocuments, section: DataSection) -> None:
    tokens, length = train.num_tokens, section.sequence_length
    if tokens < length + 1:
        raise UserError(
            f"data.sequence_length = {length}: longer than the training text, which has {tokens:,} tokens (a "
            f"sequence needs one more than its length)\n"
            f"  set data.sequence_length to at most {tokens - 1}, or give more text in data.source"
        )
    batch = max(round(size) for size in section.batch_size.ends())
    if tokens < batch * length:
        raise UserError(
            f"data.batch_size = {batch}: a batch of {batch} sequences of {length} tokens takes {batch * length:,}, "
            f"but the training text has {tokens:,} tokens\n"
            f"  set data.batch_size to at most {tokens // length}, shorten data.sequence_length, or give more text in "
            "data.source"
        )
