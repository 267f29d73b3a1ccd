"""Matrix products whose rows do not depend on how many rows there are.

BLAS libraries choose another kernel, with another order of summation, for a handful of rows; on a CPU rows of a
float32 product at M = 1, 2, 3 differ from the same rows at M = 64. A token's result must not depend on its batch,
so short products are padded with zero rows. (A BLAS may do the same for N; N is a property of the weights.)
"""

import torch
from torch import Tensor

MINIMUM_ROWS = 64


def matmul_rows(a: Tensor, b: Tensor, multiple: int = 1) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N]; each row depends on that row and b alone.

    `multiple` > 1 also pads M up to a multiple: ragged groups then meet few distinct shapes, for each of which
    the CPU library builds and keeps a kernel.
    """
    rows = a.shape[0]
    target = max(MINIMUM_ROWS, -(-rows // multiple) * multiple)
    if rows == target or rows > MINIMUM_ROWS and multiple == 1:
        return a @ b
    return (torch.nn.functional.pad(a, (0, 0, 0, target - rows)) @ b)[:rows]
