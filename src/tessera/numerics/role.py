"""A role at work: one named linear layer, its Precision, and the recorder that watches what quantisation does.

Every operand of every GEMM is made here, whatever its precision: a TiledTensor when the role is FP8, a cast
otherwise. So `ops` and `linear` are written once for the FP8 model and its BF16 and FP32 twins.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tessera.numerics.formats import E4M3
from tessera.numerics.gemm import Operand
from tessera.numerics.health import Recorder
from tessera.numerics.precision import Precision, Quantisation
from tessera.numerics.tiled_tensor import TiledTensor, quantise
from tessera.numerics.tiles import COLUMN, VECTOR, Tile


@dataclass(frozen=True)
class Role:
    """`name` is the module's path in its model, for health reports and errors."""

    name: str
    precision: Precision
    recorder: Recorder

    def input(self, x: Tensor) -> Operand:
        """x [T, K] -> fprop operand."""
        return self._make("input", x, self.precision.input)

    def input_again(self, x: Tensor) -> Operand:
        """`input` once more, in backward, of the same x: the same codes, which the recorder has seen already."""
        if not self.precision.quantised:
            return x.to(self.precision.activation_dtype)
        return self._quantise(x, self.precision.input, 0, 0, None)

    def input_cache(self, x: Tensor, fprop_operand: Operand) -> Operand:
        """What backward keeps of the input: the fprop codes, or x in the role's own cache format (E5M6)."""
        if self.precision.quantised and self.precision.input_cache is not None:
            return self._make("input_cache", x, self.precision.input_cache)
        return fprop_operand

    def input_columns(self, x: Operand, offsets: Tensor | None = None) -> Operand:
        """wgrad operand [T, K] in 128 x 1 tiles, from the cached codes (requantised) or from values."""
        target = self.precision.input_columns
        if not isinstance(x, TiledTensor):
            return self._make("input_columns", x, target, offsets=offsets)
        if x.tile == target.tile and x.format == target.format:
            return x
        plain = x.tile == VECTOR and target == Quantisation(E4M3, COLUMN, target.scale_mode) and not x.column_segment
        if plain and not self.recorder.measuring:
            operand = x.columnwise(target.scale_mode, offsets)
            self.recorder.count(f"{self.name}.input_columns", operand)
            return operand
        decoded = x.decode()
        operand = self._quantise(decoded, target, 0, 0, offsets)
        # E5M6 to E4M3 rounds once more by nature; only E4M3 to E4M3 counts as rounding twice.
        self.recorder.observe(f"{self.name}.input_columns", decoded, operand, requantised=x.format == target.format)
        return operand

    def gradient(
        self, dy: Tensor, *, column_segment: int = 0, offsets: Tensor | None = None
    ) -> tuple[Operand, Operand]:
        """dy [T, N] -> (dgrad operand in 1 x 128 tiles, wgrad operand in 128 x 1), both from the given dy."""
        return self.gradient_rows(dy, column_segment, offsets), self.gradient_columns(dy, column_segment, offsets)

    def gradient_rows(self, dy: Tensor, column_segment: int = 0, offsets: Tensor | None = None) -> Operand:
        """dy [T, N] -> dgrad operand. `offsets` matter where the ablation's tiles span rows."""
        return self._make("gradient_rows", dy, self.precision.gradient_rows, column_segment, offsets=offsets)

    def gradient_columns(self, dy: Tensor, column_segment: int = 0, offsets: Tensor | None = None) -> Operand:
        """dy [T, N] -> wgrad operand; tiles restart at each group's first row."""
        target = self.precision.gradient_columns
        segment = column_segment if target.tile.columns != 1 else 0
        return self._make("gradient_columns", dy, target, segment, offsets=offsets)

    def gate_up_cache(self, gate_up: Tensor, segment: int) -> Operand:
        """SwiGLU input [T, 2 I], gate and up tiled apart (segment I), as backward keeps it."""
        return self._make("gate_up_cache", gate_up, self.precision.gate_up_cache, segment)

    def weight(self, weight: Tensor, row_segment: int) -> Operand:
        """FP32 master [G * N, K] -> operand; tiles restart every `row_segment` rows."""
        segment = 0 if row_segment == weight.shape[0] else row_segment
        return self._make("weight", weight, self.precision.weight, row_segment=segment)

    def fuses(self, q: Quantisation, tile: Tile) -> bool:
        """Whether a kernel that makes values may hand over their E4M3 codes in `tile` for an operand quantised by `q`.

        Not while the recorder measures: what rounding did to values shows beside the values alone.
        """
        same = (q.format, q.tile, q.rounding) == (E4M3, tile, "nearest")
        return self.precision.quantised and same and not self.recorder.measuring

    def fused(
        self, operand: str, quantised: tuple[Tensor, Tensor, Tensor], q: Quantisation, offsets: Tensor | None = None
    ) -> TiledTensor:
        """The operand of (codes [R, C], scales, nonfinite) as such a kernel gives them."""
        codes, scales, nonfinite = quantised
        tiled = TiledTensor(codes, scales, nonfinite, q.tile, q.format, (codes.shape[0], codes.shape[1]), 0, 0, offsets)
        self.recorder.count(f"{self.name}.{operand}", tiled)
        return tiled

    def _make(
        self,
        operand: str,
        x: Tensor,
        quantisation: Quantisation,
        column_segment: int = 0,
        *,
        row_segment: int = 0,
        offsets: Tensor | None = None,
    ) -> Operand:
        if not self.precision.quantised:
            return x.to(self.precision.activation_dtype)
        tiled = self._quantise(x, quantisation, row_segment, column_segment, offsets)
        self.recorder.observe(f"{self.name}.{operand}", x, tiled)
        return tiled

    def _quantise(
        self, x: Tensor, q: Quantisation, row_segment: int, column_segment: int, offsets: Tensor | None
    ) -> TiledTensor:
        return quantise(
            x,
            q.format,
            q.tile,
            scale_mode=q.scale_mode,
            rounding=q.rounding,
            row_segment=row_segment,
            column_segment=column_segment,
            offsets=offsets if q.tile.rows == 128 else None,
        )


@dataclass
class _OptimizerSteps:
    """Steps taken in this process. torch's fused optimizers change parameters without counting it as a write, so
    codes that trust the version counter alone would stay those of the first step, silently.
    """

    taken: int = 0

    def count(self, *_: Any) -> None:
        self.taken += 1


_optimizer_steps = _OptimizerSteps()
register_optimizer_step_post_hook(_optimizer_steps.count)


class Weight:
    """A parameter as a GEMM operand: quantised (or cast) once after each optimizer step, then reused.

    Owns the operand, not the parameter. `operand()` refreshes when the parameter was written to or moved since;
    so micro-batches, recomputation and evaluation share one quantisation. Writes are seen by autograd's version
    counter and by the steps of torch's optimizers; in-place writes through `.data` are not seen.
    Tiles restart every `row_segment` rows, or with each matrix of a 3-d parameter when it is 0.
    """

    def __init__(self, parameter: nn.Parameter, role: Role, row_segment: int = 0) -> None:
        self.parameter = parameter
        self.role = role
        self.row_segment = row_segment or parameter.shape[-2]
        self._operand: Operand | None = None
        self._seen: tuple[int, int, int] | None = None

    def operand(self) -> Operand:
        """[G * N, K] of the parameter's current value; 3-d parameters [G, N, K] are flattened."""
        now = (self.parameter._version, self.parameter.data_ptr(), _optimizer_steps.taken)
        if self._operand is None or now != self._seen or self.role.recorder.measuring:
            with torch.no_grad():
                matrix = self.parameter.detach().flatten(0, -2)
                self._operand = self.role.weight(matrix, self.row_segment)
            self._seen = now
        return self._operand
