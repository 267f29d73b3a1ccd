"""The feed-forward half of a layer: a dense gated MLP, or shared and routed experts (report, section 2.1.2).

gate_proj and up_proj are stored as one matrix, gate first, tiled apart. The tokens of a mixture-of-experts layer
are normalised and quantised once; routed and shared experts read the same codes.
"""

import torch
from torch import Tensor, nn

from tessera.model.blueprint import Blueprint
from tessera.model.projection import Norm, Projection, current
from tessera.model.router import Router, Routing
from tessera.numerics import RoleKind, Weight
from tessera.numerics.gemm import Operand
from tessera.ops.expert_mlp import Experts, expert_mlp
from tessera.ops.linear import linear
from tessera.ops.rms_norm import add_rms_norm
from tessera.ops.saved import Again
from tessera.ops.swiglu import swiglu_linear


class GatedMlp(nn.Module):
    """y = (silu(x gate^T) * (x up^T)) down^T: gate_up_proj [2 I, H], down_proj [H, I]."""

    def __init__(self, blueprint: Blueprint, name: str, intermediate: int, gate_up: RoleKind, down: RoleKind) -> None:
        super().__init__()
        hidden = blueprint.section.hidden_size
        self.gate_up_proj = Projection(
            2 * intermediate, hidden, blueprint.role(f"{name}.gate_up_proj", gate_up), row_segment=intermediate
        )
        self.down_proj = Projection(hidden, intermediate, blueprint.role(f"{name}.down_proj", down))
        self.keep = blueprint.keep

    def after_gate_up(self, gate_up: Tensor) -> Tensor:
        """[T, 2 I] -> [T, H]."""
        return swiglu_linear(gate_up, self.gate_up_proj.role, self.down_proj.operand, self.keep)


class DenseMlp(GatedMlp):
    """The module `mlp` of the first layers."""

    def __init__(self, blueprint: Blueprint, name: str) -> None:
        intermediate = blueprint.section.intermediate_size
        super().__init__(blueprint, name, intermediate, RoleKind.DENSE_GATE_UP, RoleKind.DENSE_DOWN)

    def forward(self, x: Tensor, delta: Tensor, norm: Norm, epsilon: float) -> tuple[Tensor, Tensor]:
        """x [T, H] residual stream, delta [T, H] to be added to it -> (x + delta, what is to be added to that)."""
        x, y, kept_y = add_rms_norm(x, delta, norm.weight, epsilon, self.keep)
        role = self.gate_up_proj.role
        operand = role.input(y.detach())
        kept = self.keep.linear_input(role, operand, kept_y)
        return x, self.after_gate_up(linear(y, operand, kept, self.gate_up_proj.operand))


class SharedExperts(GatedMlp):
    """The experts of every token, one MLP of their summed width; reads the routed experts' codes."""

    def __init__(self, blueprint: Blueprint, name: str) -> None:
        section = blueprint.section
        intermediate = section.moe_intermediate_size * section.n_shared_experts
        super().__init__(blueprint, name, intermediate, RoleKind.EXPERT_GATE_UP, RoleKind.EXPERT_DOWN)

    def forward(self, x: Tensor, operand: Operand, kept: Operand | Again) -> Tensor:
        """x [T, H], its fprop operand and what stands for that in backward -> [T, H]."""
        return self.after_gate_up(linear(x, operand, kept, self.gate_up_proj.operand))


class RoutedExperts(nn.Module):
    """The stacked weights: gate_up_proj [E, 2 I, H], down_proj [E, H, I]."""

    def __init__(self, blueprint: Blueprint, name: str) -> None:
        super().__init__()
        section = blueprint.section
        experts, hidden = section.n_routed_experts, section.hidden_size
        intermediate = section.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden, dtype=torch.float32))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate, dtype=torch.float32))
        gate_up_role = blueprint.role(f"{name}.gate_up_proj", RoleKind.EXPERT_GATE_UP)
        down_role = blueprint.role(f"{name}.down_proj", RoleKind.EXPERT_DOWN)
        self._gate_up = Weight(self.gate_up_proj, gate_up_role, intermediate)
        self._down = Weight(self.down_proj, down_role, hidden)
        self.dispatcher, self.keep = blueprint.dispatcher, blueprint.keep

    def input(self, x: Tensor, kept: Tensor | Again) -> tuple[Operand, Operand | Again]:
        """x [T, H] and its stand-in in backward -> the operand that all experts read, and the stand-in of that."""
        operand = self._gate_up.role.input(x)
        return operand, self.keep.linear_input(self._gate_up.role, operand, kept)

    def forward(self, x: Tensor, operand: Operand, kept: Operand | Again, routing: Routing) -> Tensor:
        """x [T, H] with its operand as from `input` -> [T, H], the weighted sum over each token's experts."""
        self._gate_up = current(self._gate_up, self.gate_up_proj)
        self._down = current(self._down, self.down_proj)
        experts = Experts(self._gate_up, self._down)
        return expert_mlp(x, operand, kept, routing.experts, routing.weights, experts, self.dispatcher, self.keep)


class MixtureOfExperts(nn.Module):
    """The module `mlp` of the layers after the dense ones, and of MTP blocks."""

    def __init__(self, blueprint: Blueprint, name: str) -> None:
        super().__init__()
        self.keep = blueprint.keep
        self.gate = Router(blueprint.section)
        self.experts = RoutedExperts(blueprint, f"{name}.experts")
        self.shared_experts = (
            SharedExperts(blueprint, f"{name}.shared_experts") if blueprint.section.n_shared_experts else None
        )

    def forward(
        self, x: Tensor, delta: Tensor, norm: Norm, epsilon: float, num_sequences: int, replayed: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing]:
        """x [T, H] residual stream, delta [T, H] to be added to it -> (x + delta, what is to be added to that, the
        routing).
        """
        x, y, kept_y = add_rms_norm(x, delta, norm.weight, epsilon, self.keep)
        routing = self.gate(y, num_sequences, replayed, kept=kept_y)
        operand, kept = self.experts.input(y.detach(), kept_y)
        out = self.experts(y, operand, kept, routing)
        if self.shared_experts is not None:
            out = out + self.shared_experts(y, operand, kept)
        return x, out, routing
