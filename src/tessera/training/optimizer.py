"""AdamW over FP32 masters, with both moments stored in BF16 (DeepSeek-V3 report, section 3.3.3).

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

(Loshchilov and Hutter, 2019). Everything is computed in FP32; only what is kept until the next step is rounded to
BF16, to nearest. A second moment in 8 significant bits stops moving where a step changes it by less than 2^-9 of
itself, which is why the recipe refuses beta2 > 0.99 with it. Decay takes matrices, not the norms' vectors.

On a CPU with native kernels all of it is one pass over memory (fused_adamw.py); what is written out here is the path
without them and on other devices.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tessera.ops.gradient_room import leave_room
from tessera.recipe import OptimizerSection
from tessera.training import fused_adamw

MOMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class AdamW:
    """Owns the moments, not the parameters; `steps` counts the updates made. Gradients are read, never changed.

    `fused`: the native kernels make the update; false where there are none for these tensors.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], section: OptimizerSection) -> None:
        self.section = section
        self.steps = 0
        self.names = list(parameters)
        self.parameters: list[Tensor] = list(parameters.values())
        dtype = MOMENTS[section.moments]
        self.first = [torch.zeros_like(p, dtype=dtype) for p in self.parameters]
        self.second = [torch.zeros_like(p, dtype=dtype) for p in self.parameters]
        self._decayed = [p for p in self.parameters if p.dim() > 1]
        self.fused = fused_adamw.usable(self.parameters, dtype)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float) -> None:
        """One update with gradients times `gradient_scale`. A parameter without a gradient counts as one of zeros."""
        s = self.section
        self.steps += 1
        if self.fused:
            fused_adamw.adamw_(
                self.parameters,
                [p.grad for p in self.parameters],
                self.first,
                self.second,
                self.steps,
                learning_rate,
                beta1=s.beta1,
                beta2=s.beta2,
                epsilon=s.epsilon,
                weight_decay=s.weight_decay,
                gradient_scale=gradient_scale,
            )
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradients = list(torch._foreach_mul(gradients, gradient_scale))
        first = [m.float() for m in self.first]
        torch._foreach_lerp_(first, gradients, 1 - s.beta1)
        torch._foreach_copy_(self.first, first)
        second = [v.float() for v in self.second]
        torch._foreach_mul_(second, s.beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - s.beta2)
        torch._foreach_copy_(self.second, second)

        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - s.beta2**self.steps) ** 0.5)
        torch._foreach_add_(denominator, s.epsilon)
        if self._decayed:
            torch._foreach_mul_(self._decayed, 1 - learning_rate * s.weight_decay)
        torch._foreach_addcdiv_(self.parameters, first, denominator, -learning_rate / (1 - s.beta1**self.steps))

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step; their memory may serve those of the next one."""
        for parameter in self.parameters:
            leave_room(parameter)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the whole gradient, float32 []."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.fused:
            return fused_adamw.gradient_norm(gradients)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name, as a checkpoint keeps them."""
        pairs = zip(self.names, self.first, self.second, strict=True)
        return {f"{kind}.{name}": t for name, m, v in pairs for kind, t in (("first", m), ("second", v))}
