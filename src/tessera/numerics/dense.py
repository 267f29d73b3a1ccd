"""Matrix products of unquantised operands whose rows do not depend on how many rows there are.

BF16 operands on a CPU are multiplied by compiled code where it is built (kernels/native_gemm.py): float32 sums in the
order of the contraction, whatever the shape. Everything else is torch's, with care. BLAS libraries choose another
kernel, with another order of summation, for a handful of rows or of columns; on a CPU rows of a float32 product at
M = 1, 2, 3 differ from the same rows at M = 64, and with fewer than 12 columns (a router of 8 experts) rows differ by
their place in a block of four. A token's result must not depend on its batch, so short and narrow products are padded
with zeros.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from tessera import native
from tessera.numerics.kernels import native_gemm

MINIMUM_ROWS = 64
MINIMUM_COLUMNS = 16


def matmul_rows(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N] in their dtype; each row depends on that row and b alone."""
    rows, columns = a.shape[0], b.shape[1]
    a, b = tall(a, MINIMUM_ROWS), _wide(b)
    y = a @ b
    return y if y.shape == (rows, columns) else y[:rows, :columns].contiguous()


def tall(a: Tensor, rows: int) -> Tensor:
    """a [M, K] -> [at least rows, K], with rows of zeros behind."""
    return a if a.shape[0] >= rows else pad(a, (0, 0, 0, rows - a.shape[0]))


LIBRARY = torch.library.Library("tessera", "FRAGMENT")
LIBRARY.define("bf16_matmul(str kind, Tensor a, Tensor b, Tensor? offsets, ScalarType out_dtype, str isa) -> Tensor")


def matmul(
    kind: str, a: Tensor, b: Tensor, offsets: Tensor | None, out_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The three GEMMs (kinds and shapes in kernels/__init__.py) on operands of one dtype, float32 accumulation.

    `out`: memory for a result of wgrad, float32, in its shape, rows contiguous.
    """
    if out is not None:
        if not _runs_natively(a.dtype, a.device):
            return out.copy_(vectorised_matmul(kind, a, b, offsets, out_dtype))
        torch.ops.tessera.bf16_wgrad(out, a, b, offsets, False)
        return out
    if _runs_natively(a.dtype, a.device):
        return torch.ops.tessera.bf16_matmul(kind, a, b, offsets, out_dtype, "")
    return vectorised_matmul(kind, a, b, offsets, out_dtype)


def _bf16_matmul(kind: str, a: Tensor, b: Tensor, offsets: Tensor | None, out_dtype: torch.dtype, isa: str) -> Tensor:
    y = native_gemm.matmul(kind, native_gemm.values(a), native_gemm.values(b), offsets, out_dtype, isa=isa)
    assert y is not None  # there are no scales
    return y


def _fake_bf16_matmul(
    kind: str, a: Tensor, b: Tensor, offsets: Tensor | None, out_dtype: torch.dtype, isa: str
) -> Tensor:
    groups = 1 if offsets is None else offsets.numel() - 1
    return a.new_empty(native_gemm.output_shape(kind, a.shape, b.shape, groups), dtype=out_dtype)


LIBRARY.impl("bf16_matmul", _bf16_matmul, "CPU")
torch.library.register_fake("tessera::bf16_matmul", _fake_bf16_matmul, lib=LIBRARY)


class Fixed:
    """A float32 weight [N, K] that many products in turn read, rounded to `dtype`, in the form that is quickest.

    For the chunks of the output head. Results of a row depend on that row and the weight alone.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.native = _runs_natively(dtype, weight.device)
        if self.native:
            # The kernel rounds float32 values as it packs them.
            self._packed = {kind: torch.ops.tessera.bf16_pack(kind, weight) for kind in ("fprop", "dgrad")}
        else:
            self._operand = weight.to(dtype)
            self._wide = self._operand.float()

    def fprop(self, x: Tensor, out: Tensor) -> Tensor:
        """x [M, K] -> x W^T, float32 [M, N], in the first rows of `out` (at least MINIMUM_ROWS of them)."""
        if self.native:
            return self._multiply("fprop", x, out[: x.shape[0]])
        padded = tall(x.float(), MINIMUM_ROWS)
        torch.mm(padded, self._wide.t(), out=out[: padded.shape[0]])
        return out[: x.shape[0]]

    def dgrad(self, dy: Tensor, out: Tensor) -> Tensor:
        """dy [M, N] -> dy W [M, K] in `out`, in its dtype."""
        return self._multiply("dgrad", dy, out) if self.native else out.copy_(matmul_rows(dy, self._operand))

    def _multiply(self, kind: str, a: Tensor, out: Tensor) -> Tensor:
        torch.ops.tessera.bf16_packed_matmul(out, kind, a, self.weight, self._packed[kind])
        return out


def add_wgrad(dy: Tensor, x: Tensor, into: Tensor, add: bool) -> None:
    """dy [M, N], x [M, K] of one dtype: dy^T x, float32 [N, K], written to `into` or added to what is there."""
    if _runs_natively(dy.dtype, dy.device):
        torch.ops.tessera.bf16_wgrad(into, dy, x, None, add)
    else:
        into.addmm_(dy.float().t(), x.float(), beta=1 if add else 0)


def _bf16_pack(kind: str, weight: Tensor) -> Tensor:
    return native_gemm.pack(kind, native_gemm.values(weight))


def _fake_bf16_pack(kind: str, weight: Tensor) -> Tensor:
    return weight.new_empty(native_gemm.packed_bytes(kind, *weight.shape), dtype=torch.uint8)


def _bf16_packed_matmul(out: Tensor, kind: str, a: Tensor, weight: Tensor, packed: Tensor) -> None:
    sides = native_gemm.values(a), native_gemm.values(weight)
    native_gemm.matmul(kind, *sides, None, out.dtype, out=out, packed=packed)


def _bf16_wgrad(into: Tensor, dy: Tensor, x: Tensor, offsets: Tensor | None, add: bool) -> None:
    native_gemm.matmul("wgrad", native_gemm.values(dy), native_gemm.values(x), offsets, into.dtype, out=into, add=add)


LIBRARY.define("bf16_pack(str kind, Tensor weight) -> Tensor")
LIBRARY.define("bf16_packed_matmul(Tensor(a!) out, str kind, Tensor a, Tensor weight, Tensor packed) -> ()")
LIBRARY.define("bf16_wgrad(Tensor(a!) into, Tensor dy, Tensor x, Tensor? offsets, bool add) -> ()")
LIBRARY.impl("bf16_pack", _bf16_pack, "CPU")
LIBRARY.impl("bf16_packed_matmul", _bf16_packed_matmul, "CPU")
LIBRARY.impl("bf16_wgrad", _bf16_wgrad, "CPU")
torch.library.register_fake("tessera::bf16_pack", _fake_bf16_pack, lib=LIBRARY)
torch.library.register_fake("tessera::bf16_packed_matmul", lambda *_: None, lib=LIBRARY)
torch.library.register_fake("tessera::bf16_wgrad", lambda *_: None, lib=LIBRARY)


def _runs_natively(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu" and native.available()


def vectorised_matmul(kind: str, a: Tensor, b: Tensor, offsets: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`matmul` in plain PyTorch, on any device."""
    if kind == "wgrad" or out_dtype == torch.float32:
        a, b = a.float(), b.float()  # torch's BF16 product would be rounded to BF16
    if kind == "wgrad":
        y = a.t() @ b if offsets is None else _each_group(a, b, offsets)
    elif offsets is None:
        y = matmul_rows(a, b.t() if kind == "fprop" else b)
    else:
        weights = b.unflatten(0, (offsets.numel() - 1, -1))
        y = _grouped_rows(a, weights.transpose(1, 2) if kind == "fprop" else weights, offsets)
    return y.to(out_dtype)


def _grouped_rows(a: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """a [T, K], weights [G, K, N] -> [T, N]: the rows of group g times weights[g].

    Heights are rounded up to 64: the CPU library builds and keeps a kernel for each shape it meets. A product that
    is too high runs on into the rows of the next group, whose own product then overwrites them.
    """
    rows, columns = a.shape[0], weights.shape[2]
    weights = _wide(weights)
    y = a.new_empty(rows + MINIMUM_ROWS, weights.shape[2])
    for g, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start == end:
            continue
        stop = start + -(-(end - start) // MINIMUM_ROWS) * MINIMUM_ROWS
        torch.mm(tall(a[start:stop], stop - start), weights[g], out=y[start:stop])
    return y[:rows] if y.shape[1] == columns else y[:rows, :columns].contiguous()


def _each_group(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a [T, N], b [T, K] -> [G * N, K]: a^T b over the rows of each group; zero for an empty one."""
    y = a.new_zeros(offsets.numel() - 1, a.shape[1], b.shape[1])
    for g, (start, end) in enumerate(pairwise(offsets.tolist())):
        if end > start:
            torch.mm(a[start:end].t(), b[start:end], out=y[g])
    return y.flatten(0, 1)


def _wide(b: Tensor) -> Tensor:
    return b if b.shape[-1] >= MINIMUM_COLUMNS else pad(b, (0, MINIMUM_COLUMNS - b.shape[-1]))
