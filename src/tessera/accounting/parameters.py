"""Parameters by part: how many a model holds (total), and how many a token passes through (active).

DeepSeek-V3 by this count: 671.0B in total; 37.6B active with the embedding, 36.6B without it, since a token looks
up one row of it and multiplies by none. Multi-token prediction is a part that inference can do without, and is
counted apart: beside embedding and head, which it shares with the trunk, a block of 11.5B, which is the published
figure, and the projection at its entrance, 0.1B.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tessera.accounting.weights import Weight, mtp_weights, trunk_weights
from tessera.recipe import ModelSection


@dataclass(frozen=True)
class Count:
    """Parameters that are held, and those that one token passes through."""

    total: int
    active: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.total + other.total, self.active + other.active)


@dataclass(frozen=True)
class Parameters:
    """The parameters of the trunk by part, and what multi-token prediction adds, by part."""

    parts: Mapping[str, Count]
    mtp_parts: Mapping[str, Count]

    @property
    def total(self) -> int:
        """All parameters without multi-token prediction."""
        return _sum(self.parts).total

    @property
    def active(self) -> int:
        """Parameters of the trunk that a token passes through, with the whole embedding."""
        return _sum(self.parts).active

    @property
    def active_without_embedding(self) -> int:
        """Parameters of the trunk that a token is multiplied by."""
        return self.active - self.parts["embedding"].active

    @property
    def mtp_total(self) -> int:
        """What multi-token prediction adds to `total`; it shares embedding and head with the trunk."""
        return _sum(self.mtp_parts).total

    @property
    def mtp_active(self) -> int:
        """What multi-token prediction adds to `active`."""
        return _sum(self.mtp_parts).active


def parameters(model: ModelSection) -> Parameters:
    """Count the parameters of a model from its shapes."""
    return Parameters(_by_part(trunk_weights(model)), _by_part(mtp_weights(model)))


def _by_part(weights: Iterable[Weight]) -> dict[str, Count]:
    parts: dict[str, Count] = {}
    for weight in weights:
        count = Count(weight.size * weight.copies, weight.size * weight.used)
        parts[weight.part] = parts.get(weight.part, Count(0, 0)) + count
    return parts


def _sum(parts: Mapping[str, Count]) -> Count:
    return sum(parts.values(), Count(0, 0))
