"""Fill in the middle: some documents are told out of order, so that the model learns to write between two texts.

A document is cut at two places into prefix, middle and suffix, and stored prefix-suffix-middle (PSM, section 4.1 of
the DeepSeek-V3 report, at a rate of 0.1):

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <end_of_text>

The cuts fall between characters, before the text is encoded, because an editor's cursor stands anywhere: cut between
tokens, a model never sees half a word in front of a hole (Bavarian et al. 2022, section 4.3, found character cuts
best). Therefore it happens once, when the shards are written, and an epoch is the same documents in another order:
tokens of a document are known without its text, and batches stay a pure function of the shards. What a document
becomes depends on the seed and its content alone. Validation documents are left in order.
"""

import numpy as np
from numpy.typing import NDArray

from tessera.data.draws import U64, below, choice, draw

Tokens = NDArray[np.uint32]


def chosen_documents(content: U64, rate: float, seed: int) -> NDArray[np.bool_]:
    """content uint64 [n]: a key of each document -> bool [n], True for about `rate` of the documents."""
    return below(draw(content, seed, "fill in the middle"), rate)


def cut(text: str, content: int, seed: int) -> tuple[str, str, str]:
    """A document as (prefix, middle, suffix), any of which may be empty; every pair of places is equally likely."""
    key = np.array([content], dtype=np.uint64)
    first, last = sorted(choice(int(draw(key, seed, "middle", end)[0]), len(text) + 1) for end in ("first", "last"))
    return text[:first], text[first:last], text[last:]


def assembled(prefix: Tokens, middle: Tokens, suffix: Tokens, begin: int, hole: int, end: int) -> list[Tokens]:
    """The encoded parts in the order prefix-suffix-middle between the three markers; end of text is the caller's."""
    markers = np.array([[begin], [hole], [end]], dtype=np.uint32)
    return [markers[0], prefix, markers[1], suffix, markers[2], middle]
