"""What the ops are held to: decoding and GEMMs in float64 by index arithmetic, and a spy on the GEMMs they run."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.numerics import Policy, Recorder, Role, RoleKind, TiledTensor, Weight, gemm

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def role(kind: RoleKind = RoleKind.OTHER, precision: str = "fp8", name: str = "layer", tiles: str = "block") -> Role:
    return Role(name, Policy(precision=precision, tiles=tiles).role(kind), Recorder())


def weight(
    *shape: int,
    kind: RoleKind = RoleKind.OTHER,
    precision: str = "fp8",
    row_segment: int = 0,
    seed: int = 0,
    tiles: str = "block",
) -> Weight:
    parameter = torch.nn.Parameter(normal(*shape, seed=seed, scale=shape[-1] ** -0.5))
    return Weight(parameter, role(kind, precision, tiles=tiles), row_segment)


def relative(value: Tensor, exact: Tensor) -> float:
    """Relative norm of the error; below a norm of 1 (a gradient that is zero) the absolute one."""
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm().clamp(min=1.0))


def tile_of(position: Tensor, tile: int, segment: int, offsets: Tensor | None) -> Tensor:
    if tile == 1:
        return position
    if tile == 0:
        return position // segment if segment else torch.zeros_like(position)
    if offsets is not None:
        group = torch.searchsorted(offsets, position, right=True) - 1
        return offsets[group] // tile + group + (position - offsets[group]) // tile
    if not segment:
        return position // tile
    return position // segment * -(-segment // tile) + position % segment // tile


def decoded(operand: TiledTensor | Tensor) -> Tensor:
    """Exact values of an 8-bit E4M3 operand, or of a plain one, in float64."""
    if not isinstance(operand, TiledTensor):
        return operand.double()
    assert operand.format.name == "e4m3"
    rows, columns = (torch.arange(n) for n in operand.shape)
    i = tile_of(rows, operand.tile.rows, operand.row_segment, operand.offsets)
    j = tile_of(columns, operand.tile.columns, operand.column_segment, None)
    return operand.codes.view(torch.float8_e4m3fn).double() * operand.scales.double()[i][:, j]


@dataclass(frozen=True)
class Product:
    """One GEMM that ran."""

    kind: str
    a: Any
    b: Any
    offsets: Tensor | None
    result: Tensor

    def exact(self) -> Tensor:
        """The same product in float64, a group at a time."""
        a, b = decoded(self.a), decoded(self.b)
        bounds = [0, len(a)] if self.offsets is None else self.offsets.tolist()
        groups, parts = len(bounds) - 1, []
        for g in range(groups):
            rows = slice(bounds[g], bounds[g + 1])
            if self.kind == "wgrad":
                parts.append(a[rows].T @ b[rows])
            else:
                w = b.view(groups, -1, b.shape[1])[g]
                parts.append(a[rows] @ (w.T if self.kind == "fprop" else w))
        return torch.cat(parts)

    def assert_exact(self) -> None:
        """float32 results within 2e-6 (docs/numerics.md), BF16 ones equal to the rounded exact product but for ties."""
        exact = self.exact()
        if self.result.dtype == torch.float32:
            assert relative(self.result, exact) <= 2e-6, self.kind
            return
        assert relative(self.result, exact) <= 2.0**-9, self.kind  # half a unit of 8 bits
        wrong = self.result != exact.to(BF16)
        assert wrong.double().mean() < 5e-3, f"{self.kind}: {wrong.sum()} of {wrong.numel()} rounded otherwise"


def spy_on_gemms(monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    """The GEMMs that run from now on, in order."""
    seen: list[Product] = []
    fprop, dgrad, wgrad = gemm.fprop, gemm.dgrad, gemm.wgrad

    def watched(kind: str, function: Any, position: int) -> Any:
        def run(a: Any, b: Any, *rest: Any, **keywords: Any) -> Tensor:
            result = function(a, b, *rest, **keywords)
            offsets = keywords.get("offsets", rest[position] if len(rest) > position else None)
            seen.append(Product(kind, a, b, offsets, result))
            return result

        return run

    monkeypatch.setattr(gemm, "fprop", watched("fprop", fprop, 2))
    monkeypatch.setattr(gemm, "dgrad", watched("dgrad", dgrad, 2))
    monkeypatch.setattr(gemm, "wgrad", watched("wgrad", wgrad, 1))
    return seen
