"""A weight matrix as a module: the FP32 master under its published name, and its operand for the GEMMs."""

import torch
from torch import nn

from tessera.numerics import Role, Weight


class Projection(nn.Module):
    """`weight` float32 [out, in]. Several published matrices stored as one have `row_segment` rows each."""

    def __init__(self, out_features: int, in_features: int, role: Role, row_segment: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))
        self.role = role
        self.row_segment = row_segment
        self._operand = Weight(self.weight, role, row_segment)

    @property
    def operand(self) -> Weight:
        """The GEMM operand of the current parameter; quantised once after each change of its values."""
        self._operand = current(self._operand, self.weight)
        return self._operand

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{columns}, {rows}, {self.role.precision.operands}"


class Norm(nn.Module):
    """The gain `weight` float32 [width] of an RMSNorm; the ops that use it compute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def extra_repr(self) -> str:
        return str(self.weight.shape[0])


def current(operand: Weight, parameter: nn.Parameter) -> Weight:
    """`operand`, or a new one where the module's parameter has been replaced (to_empty, load with assign)."""
    if operand.parameter is parameter:
        return operand
    return Weight(parameter, operand.role, operand.row_segment)
