"""In which numbers a model's parameters are stored and multiplied: docs/numerics.md as a table for one recipe.

The model is built on device "meta", so nothing is allocated, and its modules are asked for the Precision objects
that `ops` computes with. A row for each parameter and routing bias, equal ones of consecutive layers in one row
("model.layers.[3-60].mlp.experts.down_proj"), MTP blocks apart:

    name, shape, layers (how many the row stands for), master, gradient, moments,
    input, weight (fprop); gradient_rows (dgrad, with the same weight); gradient_columns, input_columns (wgrad);
    accumulation

An operand reads "e4m3 1x128 power_of_two", or "bf16", or "-" where there is no such GEMM. What is kept for backward
is `accounting.saved_tensors`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tessera.accounting.grouping import grouped, place
from tessera.model.experts import RoutedExperts
from tessera.model.mtp import PlainProjection
from tessera.model.projection import Norm, Projection
from tessera.model.router import Router
from tessera.model.transformer import TokenTable, Transformer
from tessera.numerics import Policy
from tessera.numerics.precision import Precision, Quantisation
from tessera.recipe.model import ModelSection

WORDS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
}
EXTENT = {0: "all"}  # of a tile: the whole row or column
NO_GEMM = "-"
OPERANDS = ("input", "weight", "gradient_rows", "gradient_columns", "input_columns")


def parameter_precisions(section: ModelSection, policy: Policy, moments: str) -> list[dict[str, Any]]:
    """The rows, as plain JSON values; `moments` is the recipe's optimizer.moments."""
    model = Transformer(section, policy, device="meta")
    return grouped(_parameters(model, moments), "name", apart=section.num_hidden_layers)


def _parameters(model: Transformer, moments: str) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """(layer or None, row) of every parameter and persistent buffer, in the order of the model."""
    activations = WORDS[model.policy.activation_dtype]
    modules, trained = dict(model.named_modules()), {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        layer, name = place(name)
        yield (
            layer,
            {
                "name": name,
                "shape": list(tensor.shape),
                "master": WORDS[tensor.dtype],
                "gradient": WORDS[tensor.dtype] if f"{owner}.{leaf}" in trained else "none",
                "moments": moments if f"{owner}.{leaf}" in trained else "none",
                **_gemms(modules[owner], leaf, activations, is_head=modules[owner] is model.lm_head),
            },
        )


def _gemms(module: nn.Module, leaf: str, activations: str, *, is_head: bool) -> dict[str, str]:
    """The operands of the three GEMMs of a parameter, and how they add up."""
    match module:
        case Projection():
            return _of_role(module.role.precision)
        case RoutedExperts():
            return _of_role((module._gate_up if leaf == "gate_up_proj" else module._down).role.precision)
        case Router() if leaf == "weight":
            return dict.fromkeys(OPERANDS, "fp32") | {"accumulation": "fp32"}
        case PlainProjection():
            return dict.fromkeys(OPERANDS, activations) | {"accumulation": "fp32"}
        case TokenTable() if is_head:
            return dict.fromkeys(OPERANDS, activations) | {"accumulation": "fp32"}
        case TokenTable():  # rows are looked up in the master and rounded afterwards
            return dict.fromkeys(OPERANDS, NO_GEMM) | {"weight": activations, "accumulation": NO_GEMM}
        case Norm() | Router():
            return dict.fromkeys(OPERANDS, NO_GEMM) | {"weight": "fp32", "accumulation": NO_GEMM}
    raise TypeError(f"precision of {leaf} in a {type(module).__name__} is not known here")


def _of_role(precision: Precision) -> dict[str, str]:
    if not precision.quantised:
        return dict.fromkeys(OPERANDS, WORDS[precision.activation_dtype]) | {"accumulation": "fp32"}
    how = precision.accumulation
    operands = {operand: _words(getattr(precision, operand)) for operand in OPERANDS}
    return operands | {"accumulation": "fp32" if how.model == "float32" else f"{how.model} {how.interval}"}


def _words(q: Quantisation) -> str:
    words = [q.format.name, _tile(q), q.scale_mode]
    return " ".join(words if q.rounding == "nearest" else [*words, q.rounding])


def _tile(q: Quantisation) -> str:
    rows, columns = (EXTENT.get(extent, str(extent)) for extent in (q.tile.rows, q.tile.columns))
    return f"{rows}x{columns}"
