"""Prefix-suffix-middle: the text comes back, the places are uniform, the choice is the document's own."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data import Tokenizer
from tessera.data.encode import encode_documents
from tessera.data.fill_in_middle import chosen_documents, cut


@given(st.text(max_size=100), st.integers(0, 2**64 - 1), st.integers(0, 2**70))
@settings(deadline=None)
def test_the_three_parts_are_the_document(text: str, content: int, seed: int) -> None:
    assert "".join(cut(text, content, seed)) == text
    assert cut(text, content, seed) == cut(text, content, seed)


def test_every_pair_of_places_occurs_as_often_as_uniform_places_do() -> None:
    counts = Counter(tuple(map(len, cut("abc", content, 5))) for content in range(16_000))
    for prefix in range(4):
        for middle in range(4 - prefix):
            expected = 1000 if middle == 0 else 2000  # two uniform places out of four, sorted
            assert abs(counts[prefix, middle, 3 - prefix - middle] - expected) < 220


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_rate_is_the_share_of_documents(rate: float) -> None:
    chosen = chosen_documents(np.arange(40_000, dtype=np.uint64), rate, 3)
    assert abs(chosen.mean() - rate) <= 5 * (rate * (1 - rate) / 40_000) ** 0.5


def test_a_document_is_stored_as_prefix_suffix_middle(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = ["def name(self):\n    return value\n", "漢字 and \U0001f600\r\n", "x", tokenizer.decode([4, 3, 5])]
    for number, text in enumerate(texts):
        prefix, middle, suffix = cut(text, number, 0)
        (ids,) = encode_documents([(prefix, middle, suffix)], tmp_path / "tokenizer.json", 0)
        found = ids.tolist()
        assert found[0] == tokenizer.fim_begin and found[-1] == tokenizer.end_of_text
        hole, end = found.index(tokenizer.fim_hole), found.index(tokenizer.fim_end)
        assert tokenizer.decode(found[1:hole]) == prefix
        assert tokenizer.decode(found[hole + 1 : end]) == suffix
        assert tokenizer.decode(found[end + 1 : -1]) == middle
        markers = [i for i in found if i < 16]
        assert markers == [tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end, tokenizer.end_of_text]
