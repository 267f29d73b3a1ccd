"""Which GEMM computes in what: a `Policy` for the model, resolved to one `Precision` for each role.

A role is a linear layer's place in the architecture. The table is docs/numerics.md, "Precision by role" and "The
three GEMMs": inputs and output gradients in 1 x 128 tiles along the contraction, weights in 128 x 128, both wgrad
operands in 128 x 1. Everything that varies it (other tiles, formats, rounding, accumulation) is an experiment or a
baseline, and a value of the recipe.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from tessera.numerics.formats import E4M3, E5M2, E5M6, Format
from tessera.numerics.tiles import BLOCK, COLUMN, ROW, ROW_OF_TRANSPOSED, TENSOR, TILE, VECTOR, Tile


class RoleKind(StrEnum):
    """The linear layers that take FP8 operands; everything else never does."""

    ATTENTION_INPUT = "attention_input"  # q_a (or q) and kv_a, which share their input
    ATTENTION_UP = "attention_up"  # q_b, kv_b
    ATTENTION_OUTPUT = "attention_output"  # o
    DENSE_GATE_UP = "dense_gate_up"
    DENSE_DOWN = "dense_down"
    EXPERT_GATE_UP = "expert_gate_up"  # routed and shared: one quantisation of the tokens serves both
    EXPERT_DOWN = "expert_down"
    OTHER = "other"  # a linear of somebody else's module


@dataclass(frozen=True)
class Quantisation:
    """How one operand is made: format, tile, scale rule, rounding."""

    format: Format
    tile: Tile
    scale_mode: str = "power_of_two"
    rounding: str = "nearest"


@dataclass(frozen=True)
class Accumulation:
    """model: "float32" | "hopper" | "hopper_unpromoted"; interval: elements between promotions."""

    model: str = "float32"
    interval: int = 128


@dataclass(frozen=True)
class Precision:
    """The three GEMMs of one role. With operands "bf16" or "fp32" nothing is quantised and the rest is unused.

    input, weight: fprop. gradient_rows: dY in dgrad. gradient_columns, input_columns: wgrad. input_cache: what
    backward keeps of the input where that is not the fprop codes. gate_up_cache: what backward keeps of the
    SwiGLU input.
    """

    operands: str
    input: Quantisation
    weight: Quantisation
    gradient_rows: Quantisation
    gradient_columns: Quantisation
    input_columns: Quantisation
    input_cache: Quantisation | None
    gate_up_cache: Quantisation
    accumulation: Accumulation

    @property
    def quantised(self) -> bool:
        return self.operands == "fp8"

    @property
    def activation_dtype(self) -> torch.dtype:
        """dtype of GEMM outputs, norms and the residual stream."""
        return torch.float32 if self.operands == "fp32" else torch.bfloat16


TILES = {  # operand tiles: (input and gradient rows, weight, wgrad operands)
    "block": (VECTOR, BLOCK, COLUMN),
    "row": (ROW, ROW, ROW_OF_TRANSPOSED),
    "tensor": (TENSOR, TENSOR, TENSOR),
}

CHOICES = {
    "precision": ("fp8", "bf16", "fp32"),
    "scales": ("power_of_two", "float32", "deepseek-v3"),
    "tiles": tuple(TILES),
    "gradient_format": ("e4m3", "e5m2"),
    "gradient_tiles": ("vector", "block"),
    "rounding": ("nearest", "toward_zero"),
    "accumulation": ("float32", "hopper", "hopper_unpromoted"),
}

# report, section 3.3.2: powers of two for these inputs, and for the gradient before the expert down projection
POWER_OF_TWO_INPUTS = (RoleKind.ATTENTION_OUTPUT, RoleKind.EXPERT_GATE_UP)


@dataclass(frozen=True)
class Policy:
    """The choices of a whole model; fields are the recipe's [numerics]. Raises ValueError on an impossible mix."""

    precision: str = "fp8"
    scales: str = "power_of_two"
    tiles: str = "block"
    gradient_format: str = "e4m3"
    gradient_tiles: str = "vector"
    rounding: str = "nearest"
    accumulation: str = "float32"
    promotion_interval: int = 128

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.tiles == "block" and self.accumulation == "hopper_unpromoted":
            raise ValueError("hopper_unpromoted needs scales constant along the contraction: tiles row or tensor")
        if self.tiles != "block" and self.gradient_tiles == "block":
            raise ValueError(f"gradient_tiles block: with tiles {self.tiles} gradients use these tiles too")
        interval = self.promotion_interval
        if interval < 32 or interval % 32 or (self.tiles == "block" and TILE % interval):
            raise ValueError(f"promotion_interval {interval}: 32, 64 or 128 with block tiles, else a multiple of 32")

    @property
    def activation_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def role(self, kind: RoleKind) -> Precision:
        """The Precision of one role."""
        vector, weight, column = TILES[self.tiles]
        input_mode = gradient_mode = mode = self.scales
        if self.scales == "deepseek-v3":
            mode = "float32"
            input_mode = "power_of_two" if kind in POWER_OF_TWO_INPUTS else mode
            gradient_mode = "power_of_two" if kind is RoleKind.EXPERT_DOWN else mode
        gradient = Quantisation(E5M2 if self.gradient_format == "e5m2" else E4M3, vector, gradient_mode, self.rounding)
        columns = replace(gradient, tile=column)
        if self.gradient_tiles == "block":
            gradient, columns = replace(gradient, tile=BLOCK), replace(columns, tile=BLOCK)
        operand = Quantisation(E4M3, vector, input_mode, self.rounding)
        return Precision(
            operands=self.precision,
            input=operand,
            weight=Quantisation(E4M3, weight, mode, self.rounding),
            gradient_rows=gradient,
            gradient_columns=columns,
            input_columns=replace(operand, tile=column),
            input_cache=(
                Quantisation(E5M6, VECTOR, "power_of_two", self.rounding) if kind is RoleKind.ATTENTION_OUTPUT else None
            ),
            gate_up_cache=Quantisation(E4M3, VECTOR, mode, self.rounding),
            accumulation=Accumulation(self.accumulation, self.promotion_interval),
        )
