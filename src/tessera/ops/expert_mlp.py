"""The routed experts: y[t] = sum_j W_down[e] (silu(gate) * up * w[t, j]), e = experts[t, j], grouped GEMMs.

The tokens are quantised once, before the gather; codes and scales travel (DeepSeek-V3 report, section 3.3.3, FP8
dispatch). In backward the output's gradient is quantised once a token before it travels to the experts for dgrad;
for wgrad it is quantised 128 x 1 inside each expert's group, from the high-precision values.

Kept for backward: what stands for the tokens' operand (shared with the shared expert; gathered again, not stored in
slot order), the SwiGLU input in E4M3, the experts' ids and weights; slots are sorted again from the ids. `Keep` has
the switches. No Python loop over experts here: the grouped GEMM is one operator.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.numerics import gemm
from tessera.numerics.gemm import Operand
from tessera.numerics.role import Weight
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.ops.dispatch import Dispatcher
from tessera.ops.gradient_room import room_for_large_gradient
from tessera.ops.keep import Keep
from tessera.ops.saved import Again, load, save
from tessera.ops.swiglu import activate_backward, down_columns, down_input


@dataclass(frozen=True)
class Experts:
    """The stacked weights: gate_up [E, 2 I, H] (tiles restart at I), down [E, H, I]."""

    gate_up: Weight
    down: Weight

    @property
    def num_experts(self) -> int:
        return self.gate_up.parameter.shape[0]

    @property
    def intermediate(self) -> int:
        return self.down.parameter.shape[2]


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing_weights: Tensor,
        operand: Operand,
        kept: Operand | Again,
        expert_ids: Tensor,
        experts: Experts,
        dispatcher: Dispatcher,
        keep: Keep | None,
        gate_up_parameter: Tensor,
        down_parameter: Tensor,
    ) -> Tensor:
        up, down = experts.gate_up.role, experts.down.role
        dtype = up.precision.activation_dtype
        slots = dispatcher.plan(expert_ids, experts.num_experts)
        rows = dispatcher.dispatch(operand, slots)
        gate_up = gemm.fprop(rows, experts.gate_up.operand(), up.precision.accumulation, dtype, slots.offsets)
        weights = routing_weights.flatten()[slots.choice]
        product = down_input(gate_up, weights, down)
        y = gemm.fprop(product, experts.down.operand(), down.precision.accumulation, dtype, slots.offsets)
        if keep:
            ctx.experts, ctx.dispatcher, ctx.regather, ctx.dtype = experts, dispatcher, keep.regather_tokens, x.dtype
            if not keep.regather_tokens and up.precision.quantised and not keep.fp8_linear_inputs:
                kept = Again(up.input_again, dispatcher.dispatch(x.detach(), slots))
            elif not keep.regather_tokens:
                kept = rows
            save(ctx, kept, keep.swiglu_input(up, gate_up), routing_weights, expert_ids)
        return dispatcher.combine(y, slots, x.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        operand, cache, routing_weights, expert_ids = load(ctx)
        experts, dispatcher = ctx.experts, ctx.dispatcher
        slots = dispatcher.plan(expert_ids, experts.num_experts)
        weights = routing_weights.flatten()[slots.choice]
        up, down = experts.gate_up.role, experts.down.role
        dtype, offsets = up.precision.activation_dtype, slots.offsets
        dy = dy.contiguous()

        product_columns, gate_up = down_columns(cache, weights, down, offsets)
        values = dispatcher.dispatch(dy, slots)
        dy_rows = down.gradient_rows(dy)
        if isinstance(dy_rows, TiledTensor) and dy_rows.tile.rows > 1:  # ablation tiles span tokens
            dy_rows = down.gradient_rows(values, offsets=offsets)
        else:
            dy_rows = dispatcher.dispatch(dy_rows, slots)
        d = gemm.dgrad(dy_rows, experts.down.operand(), down.precision.accumulation, dtype, offsets)
        dy_columns = down.gradient_columns(values, offsets=offsets)
        room = room_for_large_gradient(experts.down.parameter)
        ddown = gemm.wgrad(dy_columns, product_columns, down.precision.accumulation, offsets, room)

        dgate_up, dweights = activate_backward(d, gate_up, weights, dtype)
        rows, columns = up.gradient(dgate_up, column_segment=experts.intermediate, offsets=offsets)
        dx = gemm.dgrad(rows, experts.gate_up.operand(), up.precision.accumulation, dtype, offsets)
        rows_of_x = dispatcher.dispatch(operand, slots) if ctx.regather else operand
        x_columns = up.input_columns(rows_of_x, offsets)
        room = room_for_large_gradient(experts.gate_up.parameter)
        dgate_up_weight = gemm.wgrad(columns, x_columns, up.precision.accumulation, offsets, room)

        dx = dispatcher.combine(dx, slots, dy.shape[0])
        assert dweights is not None  # the routed experts always have weights
        return (
            dx.to(ctx.dtype),
            dweights[slots.position].view(routing_weights.shape),
            *[None] * 6,
            dgate_up_weight.view_as(experts.gate_up.parameter),
            ddown.view_as(experts.down.parameter),
        )


def expert_mlp(
    x: Tensor,
    operand: Operand,
    kept: Operand | Again,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: Experts,
    dispatcher: Dispatcher,
    keep: Keep,
) -> Tensor:
    """x [T, H] with its fprop operand, expert_ids int64 [T, k], routing_weights float32 [T, k] -> [T, H].

    `kept` stands for the operand in backward.
    """
    how = keep if torch.is_grad_enabled() else None
    parameters = experts.gate_up.parameter, experts.down.parameter
    y: Tensor = _ExpertMlp.apply(x, routing_weights, operand, kept, expert_ids, experts, dispatcher, how, *parameters)
    return y
