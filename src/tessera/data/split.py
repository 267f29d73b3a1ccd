"""Which documents are held out for validation: a choice by content, so that it does not leak and does not move.

Each document has a number drawn from (seed, its content). The documents with the lowest numbers are held out, as many
as the fraction asks for. So equal documents are on the same side, a document keeps its side (but for a few at the
border) when others join, and neither side is ever empty where there are two documents.

A corpus of one document, such as one large text file, is cut in two: its last part is held out.
"""

import numpy as np
from numpy.typing import NDArray

from tessera.data.draws import U64, draw


def held_out(content: U64, fraction: float, seed: int) -> NDArray[np.bool_]:
    """content uint64 [n], n >= 2: a key of each document's content -> bool [n], True for validation.

    round(fraction n) documents, at least 1 and at most n - 1, and fewer where copies would exceed it. Copies stay
    together, unless all documents are copies of one.
    """
    n = len(content)
    wanted = min(max(round(fraction * n), 1), n - 1)
    numbers, copies_of, copies = np.unique(draw(content, seed, "split"), return_inverse=True, return_counts=True)
    if len(numbers) == 1:
        return np.arange(n) < wanted
    if copies.max() == 1:
        return copies_of < wanted
    chosen = np.zeros(len(numbers), dtype=bool)
    for i in np.flatnonzero(copies <= wanted):
        if copies[i] <= wanted:  # what fits into the rest, in the order of the numbers
            chosen[i] = True
            wanted -= copies[i]
        if not wanted:
            break
    if not chosen.any():
        chosen[copies.argmin()] = True  # every document has many copies: hold out the one that has fewest
    return chosen[copies_of]


def cut_in_two(text: str, fraction: float) -> tuple[str, str]:
    """A lone document of at least 2 characters as (training, validation), which is about its last `fraction`.

    Cut at the start of a line where the text has one near the place, within half of the held-out part.
    """
    place = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    line = text.rfind("\n", max(place - (len(text) - place) // 2, 0), place) + 1
    place = line or place
    return text[:place], text[place:]
