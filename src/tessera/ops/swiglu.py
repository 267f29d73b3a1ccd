"""SwiGLU and its down projection: y = (silu(gate) * up * w) W_down^T, w an optional weight a row.

The product is never stored. Backward keeps the SwiGLU input (gate | up, [S, 2 I]) in E4M3 with gate and up tiled
apart (or as it is, where `Keep` says so), decodes it, makes the product again and quantises it 128 x 1 for wgrad
directly (DeepSeek-V3 report, section 3.3.3; docs/numerics.md, "cached for backward"). The routing weight w multiplies
in FP32 before the quantisation. Compiled kernels go from gate | up to the codes of the product, and from its cache to
both readers in backward, without the values between; codes and scales are the same.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.numerics import gemm
from tessera.numerics.formats import E4M3
from tessera.numerics.gemm import Operand
from tessera.numerics.role import Role, Weight
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.numerics.tiles import COLUMN, VECTOR
from tessera.ops.gradient_room import room_for_large_gradient
from tessera.ops.keep import Keep
from tessera.ops.kernels import swiglu as kernels
from tessera.ops.kernels import usable
from tessera.ops.saved import load, save
from tessera.ops.sigmoid import silu, silu_and_slope


def activate(gate_up: Tensor, weight: Tensor | None, kernel: str = "") -> Tensor:
    """gate_up [S, 2 I], weight [S] float32 or None -> silu(gate) * up * weight, float32 [S, I]."""
    if usable(kernel, gate_up):
        return kernels.swiglu(gate_up, weight, kernel)
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = silu(gate).mul_(up)
    return product if weight is None else product.mul_(weight[:, None])


def activate_backward(
    d: Tensor, gate_up: Operand, weight: Tensor | None, dtype: torch.dtype, kernel: str = ""
) -> tuple[Tensor, Tensor | None]:
    """d [S, I], gate_up [S, 2 I] -> (d gate_up [S, 2 I] in `dtype`, d weight [S] float32 or None)."""
    if isinstance(gate_up, TiledTensor):
        if _in_codes(gate_up, kernel) and usable(kernel, d) and d.dtype == dtype:
            return kernels.swiglu_backward_codes(d, gate_up.codes, gate_up.scales, weight, kernel)
        gate_up = gate_up.decode()
    if usable(kernel, d, gate_up) and d.dtype == dtype and gate_up.dtype in (dtype, torch.float32):
        return kernels.swiglu_backward(d, gate_up, weight, kernel)
    gate, up = gate_up.float().chunk(2, dim=-1)
    d = d.float()
    activated, slope = silu_and_slope(gate)
    dweight = None
    if weight is not None:
        dweight = (d * activated).mul_(up).sum(dim=-1)
        d = d * weight[:, None]
    dgate_up = torch.empty(gate_up.shape, dtype=dtype, device=gate_up.device)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    dgate.copy_(slope.mul_(up).mul_(d))
    dup.copy_(activated.mul_(d))
    return dgate_up, dweight


def down_input(gate_up: Tensor, weight: Tensor | None, role: Role, kernel: str = "") -> Operand:
    """gate_up [S, 2 I] -> fprop operand [S, I] of the down projection; the product itself may never be in memory."""
    q = role.precision.input
    if usable(kernel, gate_up) and role.fuses(q, VECTOR):
        made = kernels.swiglu_row_tiles(gate_up, weight, q.scale_mode == "power_of_two", kernel)
        return role.fused("input", made, q)
    return role.input(activate(gate_up, weight, kernel))


def down_columns(
    gate_up: Operand, weight: Tensor | None, role: Role, offsets: Tensor | None, kernel: str = ""
) -> tuple[Operand, Operand]:
    """Cached SwiGLU input [S, 2 I] -> (wgrad operand [S, I] of the down projection, that input for its gradient)."""
    q = role.precision.input_columns
    if isinstance(gate_up, TiledTensor):
        if _in_codes(gate_up, kernel) and role.fuses(q, COLUMN):
            power_of_two = q.scale_mode == "power_of_two"
            made = kernels.swiglu_column_tiles(gate_up.codes, gate_up.scales, weight, offsets, power_of_two, kernel)
            return role.fused("input_columns", made, q, offsets), gate_up
        gate_up = gate_up.decode()
    return role.input_columns(activate(gate_up, weight, kernel), offsets), gate_up


def _in_codes(gate_up: TiledTensor, kernel: str) -> bool:
    """Whether a compiled kernel reads these codes: E4M3 in 1 x 128 tiles, gate and up tiled apart."""
    layout = (gate_up.tile, gate_up.format, gate_up.column_segment)
    return usable(kernel, gate_up.scales) and layout == (VECTOR, E4M3, gate_up.shape[1] // 2)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, gate_up_role: Role, down: Weight, keep: Keep | None, parameter: Tensor
    ) -> Tensor:
        p = down.role.precision
        operand = down_input(gate_up, None, down.role)
        if keep:
            ctx.down, ctx.dtype = down, gate_up.dtype
            save(ctx, keep.swiglu_input(gate_up_role, gate_up))
        return gemm.fprop(operand, down.operand(), p.accumulation, p.activation_dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, Tensor]:
        (cache,) = load(ctx)
        down: Weight = ctx.down
        p = down.role.precision
        dy = dy.contiguous()
        columns, gate_up = down_columns(cache, None, down.role, None)
        rows, dy_columns = down.role.gradient(dy)
        d = gemm.dgrad(rows, down.operand(), p.accumulation, p.activation_dtype)
        room = room_for_large_gradient(down.parameter)
        dw = gemm.wgrad(dy_columns, columns, p.accumulation, out=room)
        dgate_up, _ = activate_backward(d, gate_up, None, ctx.dtype)
        return dgate_up, None, None, None, dw.view_as(down.parameter)


def swiglu_linear(gate_up: Tensor, gate_up_role: Role, down: Weight, keep: Keep) -> Tensor:
    """gate_up [T, 2 I] -> [T, H] in the role's activation dtype."""
    kept = keep if torch.is_grad_enabled() else None
    y: Tensor = _SwigluLinear.apply(gate_up, gate_up_role, down, kept, down.parameter)
    return y
