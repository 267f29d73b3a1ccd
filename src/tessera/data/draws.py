"""Random choices as pure functions of what they are about, so that nothing has a state to save or to share.

Which documents are held out, where a middle is cut and in which order an epoch runs must not depend on the number of
processes, on the order of work, nor on the version of a random generator in a library: a run resumed next year must
see the same batches. So every choice is a hash: a start value from the seed and words that say what is chosen, and
the finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit integers whose output bits look
independent.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: SplitMix64's step
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # Stafford's mix 13


def start(seed: int, *words: str | int) -> np.uint64:
    """The start value for one kind of choice: any integer seed, and words such as ("order", epoch)."""
    text = "/".join(map(str, (seed, *words)))
    return np.uint64(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little"))


def mix(x: U64) -> U64:
    """SplitMix64's finaliser, element by element; equal inputs give equal outputs, different ones different."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def draw(keys: U64, seed: int, *words: str | int) -> U64:
    """One 64-bit number for each key; the key says which thing it is about."""
    return mix(keys ^ start(seed, *words))


def permutation(size: int, seed: int, *words: str | int) -> NDArray[np.int64]:
    """A random order of range(size). Its keys are all different (mix is a bijection), so no tie needs a rule."""
    steps = np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN + start(seed, *words)
    return np.argsort(mix(steps), kind="stable")


def below(numbers: U64, share: float) -> NDArray[np.bool_]:
    """True for `share` of the numbers: the upper 53 bits, exact in float64, as a fraction of 1."""
    return (numbers >> np.uint64(11)) * 2.0**-53 < share


def choice(number: int, options: int) -> int:
    """The number, a draw of 64 bits, as one of range(options), by Lemire's multiplication."""
    return (int(number) * options) >> 64
