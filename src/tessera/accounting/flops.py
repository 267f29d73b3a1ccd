"""Floating-point operations that the mathematics of a model needs for one token, and the share of a machine's peak.

Counted is what every implementation must do: two operations (a multiplication and an addition) for each number of
each matrix that a token passes through, and for each key and value that it attends to. In training with keys and
values expanded to all heads, a token at position i (from 0) attends to i + 1 keys, so the mean over a sequence of L
tokens is (L + 1) / 2: the causal half. Not counted are norms, activations, softmax, the optimizer, and whatever is
computed a second time to save memory; that is the convention of MFU (model FLOPs utilisation, as in the PaLM paper).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tessera.accounting.weights import Weight, mtp_weights, trunk_weights
from tessera.recipe import ModelSection

_TRAINING_PASSES = 3  # forward, gradient of the input, gradient of the weight: one GEMM of the same size each


@dataclass(frozen=True)
class Flops:
    """Operations for one token in one forward pass: the trunk's by part, and multi-token prediction's by part."""

    parts: Mapping[str, float]
    mtp_parts: Mapping[str, float]

    @property
    def forward(self) -> float:
        """One forward pass of the trunk: what prefill spends."""
        return sum(self.parts.values())

    @property
    def mtp_forward(self) -> float:
        """What multi-token prediction adds, its own passes through the shared head included."""
        return sum(self.mtp_parts.values())

    @property
    def training(self) -> float:
        """Forward and backward of trunk and multi-token prediction."""
        return _TRAINING_PASSES * (self.forward + self.mtp_forward)


def flops_per_token(model: ModelSection, context: int) -> Flops:
    """Operations for a token, averaged over a sequence of `context` tokens; raises ValueError if there are none."""
    if context < 1:
        raise ValueError(f"context {context}: a sequence has at least 1 token")
    depth = model.num_nextn_predict_layers
    mtp = _matrices(mtp_weights(model))
    if depth:
        mtp["attention core"] = depth * _attention_core(model, context)
        mtp["head"] = depth * 2.0 * model.vocab_size * model.hidden_size
    trunk = _matrices(trunk_weights(model))
    trunk["attention core"] = model.num_hidden_layers * _attention_core(model, context)
    return Flops(trunk, mtp)


def mfu(training_flops_per_token: float, tokens_per_s: float, peak_flops_per_s: float) -> float:
    """Share of the machine's peak that training spends on the model: 0.4 means 40 %.

    The peak is that of the format in which the GEMMs run; raises ValueError if it is not positive.
    """
    if not peak_flops_per_s > 0:
        raise ValueError(f"peak {peak_flops_per_s} FLOP/s: must be positive")
    return training_flops_per_token * tokens_per_s / peak_flops_per_s


def _matrices(weights: Iterable[Weight]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for weight in weights:
        if weight.multiplies:
            parts[weight.part] = parts.get(weight.part, 0.0) + 2.0 * weight.size * weight.used
    return parts


def _attention_core(model: ModelSection, context: int) -> float:
    """Scores and weighted values of one layer."""
    widths = model.qk_head_dim + model.v_head_dim
    return 2.0 * model.num_attention_heads * widths * (context + 1) / 2
