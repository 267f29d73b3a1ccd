"""Rotary position embedding, and its YaRN stretching as the published checkpoint has it.

Pair i of the rotary part turns by position * theta^(-2 i / R) (RoPE, Su et al. 2021). YaRN (Peng et al. 2023;
DeepSeek-V3 report, section 4.3) divides the slow frequencies by `factor`, leaves the fast ones, and blends between
the pairs that make beta_fast and beta_slow turns over the original context. With m(x) = 0.1 x ln(factor) + 1 the
rotated parts are scaled by m(mscale) / m(mscale_all_dim), and the softmax scale by m(mscale_all_dim)^2.

Angles are float32 products, as in every engine that runs these checkpoints: at position 100,000 another precision
would turn the fast pairs visibly differently.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.recipe.model import ModelSection, RopeScaling


@dataclass(frozen=True)
class Rotation:
    """Frequencies (radians a position, one a pair) and the factor on the rotated parts."""

    frequencies: tuple[float, ...]
    amplitude: float

    def table(self, positions: Tensor) -> Tensor:
        """positions int64 [L] or [B, L] -> complex64 [1 or B, L, R / 2]: what each pair is multiplied by."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        angle = torch.atleast_2d(positions)[..., None].float() * frequencies
        return torch.complex(angle.cos() * self.amplitude, angle.sin() * self.amplitude)


def rotation(section: ModelSection) -> Rotation:
    """The rotation of a model; frequencies are float32 values."""
    width = section.qk_rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / section.rope_theta**exponents
    scaling = section.rope_scaling
    if scaling is None:
        return Rotation(tuple(frequencies.tolist()), 1.0)
    keep = _share_kept(scaling, width, section.rope_theta)
    stretched = 1.0 / (scaling.factor * section.rope_theta**exponents)
    frequencies = stretched * (1 - keep) + frequencies * keep
    amplitude = _magnitude(scaling, scaling.mscale) / _magnitude(scaling, scaling.mscale_all_dim)
    return Rotation(tuple(frequencies.tolist()), amplitude)


def softmax_scale(section: ModelSection) -> float:
    """1 / sqrt(width of a query), times YaRN's m(mscale_all_dim) squared."""
    scale = section.qk_head_dim**-0.5
    if section.rope_scaling is not None:
        scale *= _magnitude(section.rope_scaling, section.rope_scaling.mscale_all_dim) ** 2
    return scale


def _magnitude(scaling: RopeScaling, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(scaling.factor) + 1.0


def _share_kept(scaling: RopeScaling, width: int, theta: float) -> Tensor:
    """float32 [R / 2]: 1 for pairs that keep their frequency, 0 for those divided by the factor."""
    low = math.floor(_pair_of_turns(scaling, scaling.beta_fast, width, theta))
    high = math.ceil(_pair_of_turns(scaling, scaling.beta_slow, width, theta))
    low, high = max(low, 0), min(high, width - 1)  # width, not pairs: as published
    span = high - low if high != low else 0.001  # as published, against a division by zero
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / span
    return 1 - ramp.clamp(0, 1)


def _pair_of_turns(scaling: RopeScaling, turns: float, width: int, theta: float) -> float:
    """The (fractional) pair that makes `turns` full turns over the original context."""
    context = scaling.original_max_position_embeddings
    return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
