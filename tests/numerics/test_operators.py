"""The kernels as torch operators: schemas and fake kernels hold, backends are named and dispatched."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tessera.native import instruction_sets
from tessera.numerics import BLOCK, COLUMN, E4M3, E5M6, TENSOR, VECTOR, TiledTensor, operators, quantise
from tessera.numerics.formats import Format
from tessera.numerics.tiles import Tile

OPS = torch.ops.tessera
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
OFFSETS = torch.tensor([0, 3, 3, 140])

LAYOUTS: list[tuple[Tile, Format, int, int, Tensor | None]] = [
    (VECTOR, E4M3, 0, 75, None),
    (BLOCK, E4M3, 70, 0, None),
    (COLUMN, E4M3, 0, 0, OFFSETS),
    (VECTOR, E5M6, 0, 0, None),
    (TENSOR, E4M3, 0, 0, None),
]


def quantise_arguments(
    tile: Tile, format: Format, row_segment: int, column_segment: int, offsets: Tensor | None, backend: str = ""
) -> tuple[Any, ...]:
    layout = (tile.rows, tile.columns, row_segment, column_segment, offsets)
    return (*layout, format.name, "power_of_two", "nearest", backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_quantise_and_dequantise_pass_opcheck(layout: Any, dtype: torch.dtype) -> None:
    x = torch.randn(140, 150).to(dtype)
    torch.library.opcheck(OPS.quantise.default, (x, *quantise_arguments(*layout)), test_utils=CHECKS)
    tile, format, row_segment, column_segment, offsets = layout
    q = quantise(x, format, tile, row_segment=row_segment, column_segment=column_segment, offsets=offsets)
    where = (tile.rows, tile.columns, row_segment, column_segment, offsets, format.name, 150, "")
    torch.library.opcheck(OPS.dequantise.default, (q.codes, q.scales, *where), test_utils=CHECKS)


def matmul_arguments(kind: str, grouped: bool, out_dtype: torch.dtype, accumulation: str) -> tuple[Any, ...]:
    offsets, groups = (OFFSETS, 3) if grouped else (None, 1)
    tokens, n, k = 140, 20, 30
    if kind == "wgrad":
        a = quantise(torch.randn(tokens, n), E4M3, COLUMN, offsets=offsets)
        b = quantise(torch.randn(tokens, k), E4M3, COLUMN, offsets=offsets)
    else:
        a = quantise(torch.randn(tokens, k if kind == "fprop" else n), E4M3, VECTOR)
        b = quantise(torch.randn(groups * n, k), E4M3, BLOCK, row_segment=n)
    operands = [(q.codes, q.scales, q.tile.rows, q.tile.columns, "e4m3") for q in (a, b)]
    return (kind, *operands[0], *operands[1], n if grouped else 0, offsets, accumulation, 128, out_dtype, "")


@pytest.mark.parametrize("accumulation", ["float32", "hopper"])
@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "groups"])
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_matmul_passes_opcheck(kind: str, grouped: bool, accumulation: str) -> None:
    for out_dtype in (torch.float32, torch.bfloat16):
        arguments = matmul_arguments(kind, grouped, out_dtype, accumulation)
        torch.library.opcheck(OPS.matmul.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("backend", ["reference", "torch", *(["cpu"] if instruction_sets() else [])])
@pytest.mark.parametrize("accumulation", ["float32", "hopper"])
@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "groups"])
def test_a_product_is_written_where_it_is_wanted(grouped: bool, accumulation: str, backend: str) -> None:
    *arguments, _ = matmul_arguments("wgrad", grouped, torch.float32, accumulation)
    owed = OPS.matmul(*arguments, backend)
    room = torch.full_like(owed, torch.nan)
    torch.library.opcheck(OPS.matmul_into.default, (room, *arguments, backend), test_utils=CHECKS)
    OPS.matmul_into(room.fill_(torch.nan), *arguments, backend)
    assert torch.equal(room, owed)


def test_a_backend_can_be_named_and_a_wrong_name_lists_those_there_are() -> None:
    x = torch.randn(3, 200)
    arguments = quantise_arguments(VECTOR, E4M3, 0, 0, None)[:-1]
    by_default, by_name, slow = (operators.quantise(x, *arguments, backend) for backend in ("", "torch", "reference"))
    for one, two, three in zip(by_default, by_name, slow, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    with pytest.raises(ValueError, match=r"'cuda_magic'.*torch, reference"):
        operators.quantise(x, *arguments, "cuda_magic")


def test_fake_tensors_go_through_quantise_decode_and_rows_without_data() -> None:
    with FakeTensorMode():
        q = quantise(torch.empty(2000, 352), E5M6, VECTOR)
        assert isinstance(q, TiledTensor)
        assert (q.codes.shape, q.scales.shape) == ((2000, 528), (2000, 3))
        assert q.decode(torch.bfloat16).shape == (2000, 352)


def test_a_compiled_function_contains_the_operators_whole() -> None:
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def there_and_back(x: Tensor) -> Tensor:
        arguments = quantise_arguments(VECTOR, E4M3, 0, 0, None)[:-1]
        codes, scales, _ = operators.quantise(x, *arguments)
        return operators.dequantise(codes, scales, 1, 128, 0, 0, None, "e4m3", x.shape[1])

    x = torch.randn(4, 130)
    compiled = torch.compile(there_and_back, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), there_and_back(x))
    assert [name for name in seen if "tessera" in name] == ["tessera.quantise", "tessera.dequantise"]


@pytest.mark.parametrize("backend", ["reference", "torch", *(f"cpu:{isa}" for isa in instruction_sets())])
@pytest.mark.parametrize("mode", ["power_of_two", "float32"])
@pytest.mark.parametrize("format", [E4M3, E5M6], ids=lambda f: f.name)
def test_codes_are_made_again_in_columns_as_the_quantiser_makes_them_of_decoded_values(
    format: Format, mode: str, backend: str
) -> None:
    for rows, columns, offsets in (
        (1, 1, None),
        (140, 150, OFFSETS),
        (129, 127, None),
        (140, 64, OFFSETS),
        (0, 5, None),
    ):
        x = torch.randn(rows, columns) * torch.randn(rows, columns).mul(8).exp()
        if rows > 100:
            x[3, 4], x[77, 5], x[:, 6] = float("nan"), float("inf"), 2.0**-120
        q = quantise(x, format, VECTOR, scale_mode=mode)
        owed = quantise(q.decode(), E4M3, COLUMN, scale_mode=mode, offsets=offsets)
        made = operators.requantise_columns(q.codes, q.scales, format.name, columns, offsets, mode, backend)
        assert torch.equal(made[0], owed.codes) and torch.equal(made[1], owed.scales)
        assert torch.equal(made[2], owed.nonfinite)
