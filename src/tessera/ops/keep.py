"""What a layer keeps for backward, and in which form: one switch for each saving of the DeepSeek-V3 report (3.2.1,
3.3.3). The words are the recipe's [memory]; docs/memory.md has the bytes and the time of each.

Lossless, so gradients have the same bits with and without: `fp8_linear_inputs` (backward reads the codes of the
forward pass either way), `recompute_norms`, `recompute_up_projections`, `regather_tokens`, `chunked_head`. Lossy:
`e5m6_attention_output` and `fp8_swiglu_inputs`, whose backward sees the rounded values.
"""

from dataclasses import dataclass

from torch import Tensor

from tessera.numerics.gemm import Operand
from tessera.numerics.role import Role
from tessera.ops.saved import Again


@dataclass(frozen=True)
class Keep:
    """Where nothing is quantised (BF16 and FP32 twins) the FP8 switches have no effect."""

    fp8_linear_inputs: bool = True
    e5m6_attention_output: bool = True
    fp8_swiglu_inputs: bool = True
    recompute_norms: bool = True
    recompute_up_projections: bool = True
    regather_tokens: bool = True
    chunked_head: bool = True

    def linear_input(self, role: Role, operand: Operand, value: Tensor | Again) -> Operand | Again:
        """What stands for the fprop `operand` of a linear in backward; `value` is what it was made of."""
        if not role.precision.quantised:
            return value
        if self.fp8_linear_inputs and not isinstance(value, Again):
            return operand
        return Again(role.input_again, value)

    def attention_output(self, role: Role, value: Tensor, operand: Operand) -> Operand:
        """What backward has of the attention output [T, heads * value], the input of the output projection."""
        return role.input_cache(value, operand) if self.e5m6_attention_output else value

    def swiglu_input(self, role: Role, gate_up: Tensor) -> Operand:
        """What backward has of the SwiGLU input [S, 2 I], gate and up tiled apart."""
        return role.gate_up_cache(gate_up, gate_up.shape[1] // 2) if self.fp8_swiglu_inputs else gate_up
