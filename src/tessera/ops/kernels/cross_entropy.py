"""The cross-entropy of rows of logits, and its gradient, as an operator: `torch.ops.tessera.cross_entropy`.

    loss = log(sum_j exp(z_j)) - z_target        d_j = scale * (softmax(z)_j - [j == target])

The native kernel reads logits three times and writes d once; where it is not there, and on other devices, PyTorch
computes the same. Both take each row by itself: its bits depend on nothing else. They agree to a few units in the last
place of float32, not bit for bit (another exponential, another order of summation).
"""

import torch
from torch import Tensor

from tessera.native import Kernel, available
from tessera.ops.kernels import LIBRARY

IGNORED = -100  # target of a position that has none
LIBRARY.define("cross_entropy(Tensor logits, Tensor targets, float scale, Tensor(a!)? d, str kernel) -> Tensor")

_KERNELS = {
    torch.bfloat16: Kernel("cross_entropy_bf16", "pipfpp", counts=True),
    torch.float32: Kernel("cross_entropy_f32", "pipfpp", counts=True),
}


def cross_entropy(
    logits: Tensor, targets: Tensor, scale: float = 1.0, d: Tensor | None = None, *, kernel: str = ""
) -> Tensor:
    """logits float32 [T, V], targets int64 [T] -> loss of each token in nats, float32 [T].

    d [T, V], float32 or BF16, receives `scale` times the gradient of the losses' sum, rounded once. Rows whose target
    is IGNORED have loss and gradient zero, whatever their logits. kernel: "torch", an instruction set of the native
    kernels, or "" for the best there is. Raises ValueError for targets that are neither a column nor IGNORED.
    """
    loss: Tensor = torch.ops.tessera.cross_entropy(logits, targets, scale, d, kernel)
    return loss


def _on_cpu(logits: Tensor, targets: Tensor, scale: float, d: Tensor | None, kernel: str) -> Tensor:
    if kernel == "torch" or not (kernel or (available() and _problem(logits, d) is None)):
        return _in_torch(logits, targets, scale, d, kernel)
    if problem := _problem(logits, d):
        raise ValueError(problem)
    rows, columns = logits.shape
    logits, targets, loss = logits.contiguous(), targets.contiguous(), logits.new_empty(rows)
    run = _KERNELS[torch.float32 if d is None else d.dtype]
    if run(rows, logits, columns, targets, scale, loss, d, work=columns, isa=kernel):
        raise _wrong_target(targets, columns)
    return loss


def _problem(logits: Tensor, d: Tensor | None) -> str | None:
    """Why the native kernel cannot take these."""
    if logits.dtype != torch.float32:
        return f"logits: float32 is needed, got {logits.dtype}"
    if d is not None and (d.shape != logits.shape or not d.is_contiguous() or d.dtype not in _KERNELS):
        return f"d: contiguous BF16 or float32 {tuple(logits.shape)} is needed, got {d.dtype} {tuple(d.shape)}"
    return None


def _in_torch(logits: Tensor, targets: Tensor, scale: float, d: Tensor | None, kernel: str) -> Tensor:
    counted, columns = targets != IGNORED, logits.shape[1]
    index = torch.where(counted, targets, 0)[:, None]
    if not logits.is_cuda and bool(((index < 0) | (index >= columns)).any()):
        raise _wrong_target(targets, columns)
    largest, own = logits.amax(dim=-1), logits.gather(1, index).squeeze(1)
    same = d is not None and d.dtype == torch.float32
    probability = torch.softmax(logits, dim=-1, out=d) if same else torch.softmax(logits, dim=-1)
    # The largest logit's probability is 1 / sum(exp(logit - largest)), at least 1 / V.
    loss = largest - probability.amax(dim=-1).log() - own
    if d is not None:
        probability.mul_(scale).scatter_add_(1, index, probability.new_full(index.shape, -scale))
        d.copy_(probability.masked_fill_(~counted[:, None], 0.0))
    return torch.where(counted, loss, 0.0)


def _wrong_target(targets: Tensor, columns: int) -> ValueError:
    wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= columns))]
    return ValueError(f"target {int(wrong[0])}: the vocabulary has {columns} tokens, IGNORED is {IGNORED}")


def _fake(logits: Tensor, targets: Tensor, scale: float, d: Tensor | None, kernel: str) -> Tensor:
    return logits.new_empty(logits.shape[0])


LIBRARY.impl("cross_entropy", _on_cpu, "CPU")
LIBRARY.impl("cross_entropy", _in_torch, "CUDA")
torch.library.register_fake("tessera::cross_entropy", _fake, lib=LIBRARY)
