"""When a step is not finite: name where it began, before the optimizer sees it.

FP8 casts saturate silently, so the quantisers count NaN and infinity before the cast, in every role. Where they
met none (the BF16 and FP32 arms, the head, the router), each module's output is looked at while the forward pass is
run again; a gradient that is not finite behind a finite forward is named by its parameter.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tessera.model import Output, Routing
from tessera.numerics import Recorder
from tessera.training.stability import Stopped


class NonFinite(Stopped):
    """A step whose loss or gradient is NaN or infinite; `where` names the first module or tensor found."""

    def __init__(self, step: int, where: str) -> None:
        super().__init__(
            f"step {step}: not finite, first seen in {where}; stopped before the optimizer, the weights are those of "
            f"step {step}\nlower optimizer.learning_rate, or resume from an earlier checkpoint with other data; "
            'stability.on_nonfinite = "skip" or "lower" leaves such a step out and trains on, also in the recipe.toml '
            "of this run before --resume",
            f"not finite in {where}",
        )
        self.where = where


def find(model: nn.Module, recorder: Recorder, forward: Callable[[], Any]) -> str:
    """Where the non-finite value of this step began; `forward` runs the step's forward pass again.

    In the order of causes: a weight, an operand of the forward pass, a module's output, an operand of the backward
    pass, a gradient.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weight {name}"
    met = recorder.first_nonfinite()  # of both passes
    recorder.clear()
    output = first_module(model, forward)
    if early := recorder.first_nonfinite():
        return f"{early[0]} ({early[1]} values)"
    if output:
        return f"the output of {output}"
    if met:
        return f"{met[0]} ({met[1]} values)"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return "the loss"


@torch.no_grad()
def first_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first module, in the order in which they finish, whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not torch.isfinite(t).all() for t in _floating(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _floating(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(vars(value) if isinstance(value, (Output, Routing)) else value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
