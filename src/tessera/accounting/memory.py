"""The memory of a training run of a recipe: what lives throughout, and what a micro-batch keeps for backward.

Parameters are FP32 masters, and FP32 gradients beside them; both moments have the optimizer's dtype; the moving
average, where there is one, is FP32 in CPU memory. A checkpoint that is written beside the steps is written from a copy
of all of these, in CPU memory too. The linears' weights live a second time as the operands of their GEMMs: FP8 codes
with a scale a tile, or BF16; in FP32 the master is the operand.

Not counted: what a step needs for a moment (a layer's gradients, the optimizer's working copies, one chunk of logits),
and the program itself; `inspect memory --measure` and benchmarks/memory.py measure.
"""

from dataclasses import dataclass
from math import prod

from tessera.accounting.parameters import parameters
from tessera.accounting.saved import TILE, SavedTensor, saved_tensors
from tessera.accounting.weights import Weight, mtp_weights, trunk_weights
from tessera.recipe import Recipe

FP8_PARTS = ("attention", "dense MLP", "shared experts", "routed experts")  # parts whose matrices are FP8's
_MOMENT_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes. `saved` is of one micro-batch of `tokens` tokens, listed in `tensors`.

    `ema` and `checkpoint_copy` lie in CPU memory.
    """

    masters: int
    gradients: int
    moments: int
    operands: int
    ema: int
    checkpoint_copy: int
    tokens: int
    tensors: list[SavedTensor]

    @property
    def saved_per_token(self) -> int:
        """Bytes that each token of a micro-batch adds to what is kept for backward."""
        return sum(tensor.bytes_per_token for tensor in self.tensors)

    @property
    def saved_fixed(self) -> int:
        """Bytes kept for backward whatever the number of tokens."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def saved(self) -> int:
        return self.saved_per_token * self.tokens + self.saved_fixed

    @property
    def total(self) -> int:
        """All of it, on one device and one CPU together."""
        cpu = self.ema + self.checkpoint_copy
        return self.masters + self.gradients + self.moments + self.operands + cpu + self.saved

    def layer(self, number: int) -> int:
        """Bytes a token that one layer keeps, MTP blocks counted after the trunk's layers."""
        return sum(tensor.bytes_per_token for tensor in self.tensors if tensor.layer == number)

    def kinds(self) -> dict[str, int]:
        """Bytes a token by kind of tensor, the largest first."""
        sums: dict[str, int] = {}
        for tensor in self.tensors:
            sums[tensor.kind] = sums.get(tensor.kind, 0) + tensor.bytes_per_token
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def memory(recipe: Recipe) -> Memory:
    """The memory of the recipe's run, for its largest micro-batch; nothing is allocated."""
    counts = parameters(recipe.model)
    trained = counts.total + counts.mtp_total
    sequences = recipe.training.micro_batch_size or recipe.largest_batch_size()
    weights = [*trunk_weights(recipe.model), *mtp_weights(recipe.model)]
    masters, moments = 4 * trained, 2 * _MOMENT_BYTES[recipe.optimizer.moments] * trained
    ema = 0 if recipe.training.ema_decay is None else masters
    return Memory(
        masters=masters,
        gradients=masters,
        moments=moments,
        operands=sum(_operand_bytes(weight, recipe) for weight in weights if weight.part in FP8_PARTS),
        ema=ema,
        checkpoint_copy=masters + moments + ema if recipe.checkpoint.asynchronous else 0,
        tokens=sequences * recipe.data.sequence_length,
        tensors=saved_tensors(recipe.model, recipe.numerics, recipe.memory),
    )


def _operand_bytes(weight: Weight, recipe: Recipe) -> int:
    """A weight as an operand of GEMMs, all its copies."""
    rows, columns = weight.shape
    match recipe.numerics.precision, recipe.numerics.tiles:
        case "fp32", _:
            return 0
        case "bf16", _:
            return 2 * weight.size * weight.copies
        case _, "block":
            scales = prod(-(-extent // TILE) for extent in (rows, columns))
        case _, "row":
            scales = rows
        case _:
            scales = 1
    return (weight.size + 4 * scales) * weight.copies
