"""[optimizer]: AdamW on FP32 master weights, with the report's values as defaults (section 4.2)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from tessera.recipe.schedule import Schedule
from tessera.recipe.section import Section


class OptimizerSection(Section):
    """AdamW: learning rate, moments, decay and clipping."""

    learning_rate: Schedule = Field(description="Learning rate in each step.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay, times the learning rate.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest norm of the whole gradient; above it is scaled down.")
    moments: Literal["bf16", "fp32"] = Field("bf16", description="Storage of both moments; bf16 needs beta2 <= 0.99.")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.moments == "bf16" and self.beta2 > 0.99:
            yield (
                "beta2",
                f'{self.beta2} must be at most 0.99 with moments = "bf16": a smaller change of the second moment '
                'is lost in BF16\'s 8 bits and it freezes; use moments = "fp32"',
            )
