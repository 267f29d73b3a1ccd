"""What FP8 did to each tensor: measured where it is quantised, at the steps that ask for it.

A `Recorder` is shared by all roles of one model and passed in when the model is built. It always counts non-finite
elements (the quantiser meets them anyway), so that the trainer can stop before the optimizer and name the first
tensor. While `measuring` it also compares each quantised tensor with its source.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from tessera.numerics.tiled_tensor import TiledTensor
from tessera.numerics.tiles import TILE


@dataclass
class Recorder:
    """`nonfinite`: tensor name -> int64 [], in the order met; `tensors`: name -> statistics. Reset by `clear`.

    A tensor met again (a further micro-batch) adds to its count and replaces its statistics.
    """

    measuring: bool = False
    nonfinite: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, dict[str, float | int | None]] = field(default_factory=dict)

    def clear(self) -> None:
        self.nonfinite.clear()
        self.tensors.clear()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within the block nothing is measured, and what is counted there is forgotten behind it."""
        measuring, nonfinite, tensors = self.measuring, dict(self.nonfinite), dict(self.tensors)
        self.measuring = False
        try:
            yield
        finally:
            self.measuring, self.nonfinite, self.tensors = measuring, nonfinite, tensors

    def observe(self, name: str, source: Tensor, quantised: TiledTensor, *, requantised: bool = False) -> None:
        """Count non-finite elements of `quantised`, and measure it against `source` [R, C] when asked to.

        `requantised`: the source is itself decoded codes; elements whose value changed were rounded twice.
        """
        self.count(name, quantised)
        if self.measuring and source.numel():
            self.tensors[name] = measure(source, quantised, requantised=requantised)

    def count(self, name: str, quantised: TiledTensor) -> None:
        """Count the non-finite elements of `quantised`."""
        seen = self.nonfinite.get(name)
        self.nonfinite[name] = quantised.nonfinite if seen is None else seen + quantised.nonfinite

    def first_nonfinite(self) -> tuple[str, int] | None:
        """(tensor name, count) of the first tensor that met a NaN or an infinity since `clear`, or None."""
        if not self.nonfinite:
            return None
        names = list(self.nonfinite)
        counts = torch.stack([self.nonfinite[name] for name in names]).tolist()
        return next(((n, c) for n, c in zip(names, counts, strict=True) if c), None)


def measure(source: Tensor, quantised: TiledTensor, *, requantised: bool) -> dict[str, float | int | None]:
    """Statistics of one quantised matrix; fractions are of its elements, those that are not finite among them.

    relative_rms: |q - x| / |x| (Frobenius) of the finite elements. saturated: coded at the largest finite value.
    flushed: not zero, coded zero. rounded_twice: decoded value changed by a second quantisation (None where there
    was no first). scale_min, scale_max: of the tiles that have elements.
    """
    x, q = source.float(), quantised.decode()
    finite = torch.isfinite(x) & torch.isfinite(q)
    x, q = torch.where(finite, x, 0.0), torch.where(finite, q, 0.0)
    elements = x.numel()
    norm = x.norm()
    scales = _scales_in_use(quantised)
    return {
        "relative_rms": float((q - x).norm() / norm) if norm > 0 else 0.0,
        "saturated": int((_magnitudes(quantised) == quantised.format.largest).sum()) / elements,
        "flushed": int(((q == 0) & (x != 0)).sum()) / elements,
        "rounded_twice": int((q != x).sum()) / elements if requantised else None,
        "nonfinite": int(quantised.nonfinite),
        "scale_min": float(scales.min()),
        "scale_max": float(scales.max()),
        "elements": elements,
    }


def _magnitudes(quantised: TiledTensor) -> Tensor:
    """Magnitudes of the codes themselves, without their scales."""
    return replace(quantised, scales=torch.ones_like(quantised.scales)).decode().abs()


def _scales_in_use(quantised: TiledTensor) -> Tensor:
    """The scales without the rows that no group of tokens reaches; those are 1 whatever the data (tiles.py)."""
    offsets = quantised.offsets
    if offsets is None or quantised.tile.rows != TILE:
        return quantised.scales
    rows = [
        start // TILE + g + tile
        for g, (start, end) in enumerate(pairwise(offsets.tolist()))
        for tile in range(-(-(end - start) // TILE))
    ]
    return quantised.scales[rows]
