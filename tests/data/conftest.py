import random

import pytest

from tessera.data import Tokenizer

WORDS = [
    "def", "return", "self", "value", "of", "the", "a", "is", "not", "in", "for", "and", "import", "None", "count",
    "name", "list", "x",
]  # fmt: skip


def prose(seed: int, words: int) -> str:
    """Text of random words with line ends, some of them blank lines; equal seeds give equal text."""
    r = random.Random(seed)
    return "".join(r.choice(WORDS) + r.choice([" ", " ", " ", "\n", "\n\n    ", ", ", " 42 "]) for _ in range(words))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([prose(seed, 400) for seed in range(20)], 320)
