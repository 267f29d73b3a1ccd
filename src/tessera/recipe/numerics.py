"""[numerics]: in which numbers the GEMMs run. docs/numerics.md is the law that these words refer to.

The defaults are the recipe of the DeepSeek-V3 report with power-of-two scales. The other values are baselines
and ablations; a combination that the arithmetic cannot give is refused here, and so is one in which a field
would silently have no effect.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from tessera.recipe.section import Section


class NumericsSection(Section):
    """Precision of the linears, and how FP8 operands are scaled, rounded and summed."""

    precision: Literal["fp8", "bf16", "fp32"] = Field(
        "fp8", description='Operands of the linears; "bf16" is FP8\'s twin, "fp32" casts nothing anywhere.'
    )
    scales: Literal["power_of_two", "float32", "deepseek-v3"] = Field(
        "power_of_two",
        description='Scale of a tile; "deepseek-v3" is float32 with powers of two where the report has them.',
    )
    tiles: Literal["block", "row", "tensor"] = Field(
        "block",
        description='What shares a scale: "block" is 1x128 activations and 128x128 weights, or a row, or all.',
    )
    gradient_format: Literal["e4m3", "e5m2"] = Field(
        "e4m3", description="FP8 format of output gradients; e5m2 is an ablation."
    )
    gradient_tiles: Literal["vector", "block"] = Field(
        "vector",
        description="Tiles of output gradients: 1x128 and 128x1, or 128x128 (diverged in the report's appendix B.2).",
    )
    rounding: Literal["nearest", "toward_zero"] = Field(
        "nearest", description="Rounding to FP8; toward_zero is an ablation that the verdict must catch."
    )
    accumulation: Literal["float32", "hopper", "hopper_unpromoted"] = Field(
        "float32",
        description="Sums inside a GEMM: FP32, or Hopper's 13 fraction bits with or without promotion to FP32.",
    )
    promotion_interval: int = Field(
        128,
        ge=32,
        multiple_of=32,
        description="Products along K summed before promotion to FP32: 32, 64 or 128 with block tiles.",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.tiles != "block":
            if self.gradient_tiles == "block":
                yield (
                    "gradient_tiles",
                    f'"block" needs tiles = "block"; with tiles = "{self.tiles}" gradients use these tiles too',
                )
            return
        if self.accumulation == "hopper_unpromoted":
            yield (
                "accumulation",
                '"hopper_unpromoted" needs scales that are constant along K: set tiles = "row" or "tensor"',
            )
        if self.promotion_interval not in (32, 64, 128):
            yield (
                "promotion_interval",
                f'{self.promotion_interval} must be 32, 64 or 128 with tiles = "block", whose scales change every '
                '128 products; longer intervals need tiles = "row" or "tensor"',
            )
