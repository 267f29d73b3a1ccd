"""Saving operands for backward through autograd, so that hooks on saved tensors see every byte that is kept.

An operand is a plain tensor or a TiledTensor; autograd saves tensors. `save` flattens, `load` puts back.
"""

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tessera.numerics.gemm import Operand

Saved = Operand | Tensor | None


def save(ctx: Any, *values: Saved) -> None:
    """Keep `values` (operands, tensors, None) for backward; call once in a Function's forward."""
    leaves, spec = pytree.tree_flatten(list(values))
    ctx.save_for_backward(*leaves)
    ctx.saved_spec = spec


def load(ctx: Any) -> list[Any]:
    """The values given to `save`, in order."""
    return pytree.tree_unflatten(list(ctx.saved_tensors), ctx.saved_spec)
