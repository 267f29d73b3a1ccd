"""AdamW and the gradient's norm over all parameters in one call each: `torch.ops.tessera.adamw_`, `gradient_norm`.

The formula is that of optimizer.py; one pass over memory, without FP32 copies of the moments or a scaled copy of the
gradient. Tensors are cut into chunks of CHUNK elements, which are what threads share, so a large embedding and many
small norms take the threads alike and results do not depend on their number.

The moments have the bits of optimizer.py's own path where the machine fuses a * b + c (AVX2, AVX-512, NEON), else they
may differ by one place before they are rounded. The update m / (sqrt(v / c2) + eps) is computed as
sqrt(c2) m / (sqrt(v) + sqrt(c2) eps), one division less, within 4 units in its last place of float32.
"""

from collections.abc import Sequence
from math import fsum

import torch
from torch import Tensor

from tessera.native import Kernel, available

CHUNK = 1 << 14  # elements; 320 KiB of masters, gradients and BF16 moments
LIBRARY = torch.library.Library("tessera", "FRAGMENT")
LIBRARY.define(
    "adamw_(Tensor(a!)[] parameters, Tensor?[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, int step, "
    "float learning_rate, float beta1, float beta2, float epsilon, float weight_decay, float gradient_scale, "
    "str isa) -> ()"
)
LIBRARY.define("gradient_norm(Tensor[] gradients, str isa) -> Tensor")

_STEP = {
    torch.bfloat16: Kernel("adamw_bf16", "pifffffff"),
    torch.float32: Kernel("adamw_f32", "pifffffff"),
}
_SUM_OF_SQUARES = Kernel("sum_of_squares", "pip")


def usable(parameters: Sequence[Tensor], moments: torch.dtype) -> bool:
    """Whether the native kernels are there and these tensors are ones they take: contiguous float32, on the CPU."""
    plain = all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return plain and moments in _STEP and available()


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: int,
    learning_rate: float,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    gradient_scale: float = 1.0,
    isa: str = "",
) -> None:
    """Update number `step` (from 1) of float32 `parameters`, in place, and of their moments, BF16 or float32.

    Parameters and moments are contiguous, on the CPU. A gradient is multiplied by `gradient_scale`; None stands for
    zeros. Decay takes tensors of two dimensions and more. isa: an instruction set, "" for the best there is.
    """
    if not parameters:
        return
    torch.ops.tessera.adamw_(
        parameters,
        gradients,
        first,
        second,
        step,
        learning_rate,
        beta1,
        beta2,
        epsilon,
        weight_decay,
        gradient_scale,
        isa,
    )
    torch.autograd.graph.increment_version(list(parameters))  # numerics' Weight quantises again because of it


def gradient_norm(gradients: Sequence[Tensor | None], *, isa: str = "") -> Tensor:
    """Euclidean norm of all gradients together, float32 []; squares and sums in float64, None stands for zeros."""
    given = [g for g in gradients if g is not None]
    norm: Tensor = torch.ops.tessera.gradient_norm(given, isa) if given else torch.zeros(())
    return norm


def _adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor | None],
    first: list[Tensor],
    second: list[Tensor],
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    gradient_scale: float,
    isa: str,
) -> None:
    gradients = [None if g is None else _dense(g) for g in gradients]
    _check(parameters, gradients, first, second)
    rows = [
        (p.data_ptr(), 0 if g is None else g.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel(), p.dim() > 1)
        for p, g, m, v in zip(parameters, gradients, first, second, strict=True)
    ]
    correction = (1 - beta2**step) ** 0.5
    _STEP[first[0].dtype](
        _chunks(parameters),
        torch.tensor(rows, dtype=torch.int64),
        CHUNK,
        gradient_scale,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - learning_rate * weight_decay,
        -learning_rate * correction / (1 - beta1**step),
        epsilon * correction,
        work=CHUNK,
        isa=isa,
    )


def _gradient_norm(gradients: list[Tensor], isa: str) -> Tensor:
    gradients = [_dense(g) for g in gradients]
    table = torch.tensor([(0, g.data_ptr(), 0, 0, g.numel(), 0) for g in gradients], dtype=torch.int64)
    sums = torch.empty(_chunks(gradients), dtype=torch.float64)
    _SUM_OF_SQUARES(len(sums), table, CHUNK, sums, work=CHUNK, isa=isa)
    return torch.tensor(fsum(sums.tolist()) ** 0.5, dtype=torch.float32)


def _chunks(tensors: Sequence[Tensor]) -> int:
    return sum(-(-t.numel() // CHUNK) for t in tensors)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.float().contiguous()


def _check(parameters: list[Tensor], gradients: list[Tensor | None], first: list[Tensor], second: list[Tensor]) -> None:
    dtype = first[0].dtype
    for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
        same = p.shape == m.shape == v.shape and (g is None or g.shape == p.shape)
        dense = p.is_contiguous() and m.is_contiguous() and v.is_contiguous()
        if not (same and dense and p.dtype == torch.float32 and m.dtype == v.dtype == dtype and dtype in _STEP):
            raise ValueError(
                f"a parameter {tuple(p.shape)} {p.dtype} with moments {tuple(m.shape)} {m.dtype}: contiguous tensors "
                "of one shape are needed, float32, with moments that are all float32 or all BF16"
            )


LIBRARY.impl("adamw_", _adamw_, "CPU")
LIBRARY.impl("gradient_norm", _gradient_norm, "CPU")
torch.library.register_fake("tessera::adamw_", lambda *_: None, lib=LIBRARY)
torch.library.register_fake("tessera::gradient_norm", lambda gradients, isa: torch.empty(()), lib=LIBRARY)
