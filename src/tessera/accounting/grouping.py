"""Rows of a table that differ in their layer only, as one row: "model.layers.[3-60].mlp"."""

from collections.abc import Iterable
from typing import Any


def place(name: str) -> tuple[int | None, str]:
    """ "model.layers.3.mlp.gate.weight" -> (3, "model.layers.{}.mlp.gate.weight")."""
    _, _, rest = name.partition("model.layers.")
    if not rest:
        return None, name
    number, dot, tail = rest.partition(".")
    return int(number), f"model.layers.{{}}{dot}{tail}"


def grouped(
    rows: Iterable[tuple[int | None, dict[str, Any]]], title: str, apart: int | None = None
) -> list[dict[str, Any]]:
    """Rows that differ in their layer only as one, in order of appearance, with "layers": how many it stands for.

    `rows` are (layer or None, row), the layer's number in row[title] replaced by "{}" (see `place`). Layers from
    `apart` on stand for themselves. Equal rows without a layer are counted too.
    """
    groups: dict[tuple[bool, str], tuple[dict[str, Any], list[int | None]]] = {}
    for layer, row in rows:
        is_apart = layer is not None and apart is not None and layer >= apart
        _, layers = groups.setdefault((is_apart, str(row)), (row, []))
        layers.append(layer)
    return [row | {title: _over(row[title], layers), "layers": len(layers)} for row, layers in groups.values()]


def _over(name: str, layers: list[int | None]) -> str:
    """`name` with the numbers of its layers, which are consecutive: dense ones come first, MTP blocks last."""
    if layers[0] is None:
        return name
    return name.format(str(layers[0]) if len(layers) == 1 else f"[{layers[0]}-{layers[-1]}]")
