"""The compiled ops as torch operators: schemas and fake kernels hold, and a compiled function contains them whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessera import native
from tessera.numerics import E4M3, VECTOR, quantise
from tessera.ops.kernels import norm, routing, slots, swiglu
from tests.ops.float64 import BF16, normal

OPS = torch.ops.tessera
REGISTERED_BY = (norm, routing, slots, swiglu)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
pytestmark = pytest.mark.skipif(not native.available(), reason=native.problem())


def calls(dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    x, y, gamma, inverse_rms = normal(70, 40).to(dtype), normal(70, 40, seed=1).to(dtype), normal(40), torch.rand(70, 1)
    gate_up, d, weight, offsets = normal(140, 300).to(dtype), normal(140, 150).to(dtype), torch.rand(140), OFFSETS
    cache = quantise(gate_up, E4M3, VECTOR, column_segment=150)
    affinity, bias, ids = torch.rand(30, 16), normal(16), torch.randint(16, (30, 4))
    return [
        (OPS.rms_norm, (x, gamma, 1e-6, "")),
        (OPS.add_rms_norm, (x, y, gamma, 1e-6, "")),
        (OPS.rms_norm_again, (x, gamma, inverse_rms, "")),
        (OPS.rms_norm_backward, (y, x, gamma, inverse_rms, None, "")),
        (OPS.rms_norm_backward, (y, x, gamma, inverse_rms, y, "")),
        (OPS.swiglu, (gate_up, weight, "")),
        (OPS.swiglu_backward, (d, gate_up, None, "")),
        (OPS.swiglu_backward_codes, (d, cache.codes, cache.scales, weight, "")),
        (OPS.swiglu_row_tiles, (gate_up, weight, True, "")),
        (OPS.swiglu_column_tiles, (cache.codes, cache.scales, weight, offsets, False, "")),
        (OPS.sort_slots, (ids, 16, "")),
        (OPS.combine, (x, torch.randperm(70), 35, "")),
        (OPS.select_experts, (affinity, bias, 4, 2, 3, -1.0, "")),
        (OPS.balance, (affinity, 3, 4, "")),
        (OPS.balance_backward, (affinity, torch.rand(3, 16), 0.5, "")),
    ]


OFFSETS = torch.tensor([0, 3, 3, 140])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_every_operator_passes_opcheck(dtype: torch.dtype) -> None:
    for operator, arguments in calls(dtype):
        torch.library.opcheck(operator.default, arguments, test_utils=CHECKS)


def test_a_compiled_function_contains_the_operators_whole() -> None:
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def twice(x: Tensor, gamma: Tensor) -> Tensor:
        return norm.rms_norm(norm.rms_norm(x, gamma, 1e-6)[0], gamma, 1e-6)[0]

    x, gamma = normal(5, 40), normal(40, seed=1)
    compiled = torch.compile(twice, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, gamma), twice(x, gamma))
    assert [name for name in seen if "tessera" in name] == ["tessera.rms_norm"] * 2


def test_a_set_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"'avx1024'.*portable"):
        norm.rms_norm(normal(2, 3), normal(3), 1e-6, "avx1024")
