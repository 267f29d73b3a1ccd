"""Make any nn.Module's linear layers train in FP8."""

from collections.abc import Callable

from torch import nn

from tessera.numerics.health import Recorder
from tessera.numerics.linear import Linear
from tessera.numerics.precision import Policy, RoleKind
from tessera.numerics.role import Role


def convert(
    module: nn.Module,
    policy: Policy | None = None,
    *,
    select: Callable[[str, nn.Linear], bool] | None = None,
    recorder: Recorder | None = None,
) -> nn.Module:
    """Replace each nn.Linear inside `module` by one whose three GEMMs follow `policy`; returns `module`.

    Parameters are kept: the same nn.Parameter objects, cast to FP32 masters in place where they are not FP32, so an
    optimizer may be made before or after, and the state dict's names do not change. `select(name, linear)` says
    which layers to convert; the default leaves `lm_head` (the output head stays in high precision, docs/numerics.md).
    Weights shared with a module that is not an nn.Linear (tied embeddings) belong out of the selection. Subclasses
    of nn.Linear have a meaning of their own and are left alone. A layer used in two places stays one layer.

    Raises ValueError when `module` is itself an nn.Linear (there is nothing to put the new layer into), when nothing
    was selected, and for a selected layer whose weight is no parameter.
    """
    if type(module) is nn.Linear:
        raise ValueError("convert replaces the linear layers inside a module; put this one into an nn.Sequential")
    policy, recorder = policy or Policy(), recorder or Recorder()
    select = select or (lambda name, _: name.rsplit(".", 1)[-1] != "lm_head")
    converted: dict[nn.Linear, Linear] = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if type(child) is not nn.Linear or not (child in converted or select(name, child)):
            continue
        if child not in converted:
            weight, bias = child.weight, child.bias
            if not isinstance(weight, nn.Parameter):  # weight_norm and its like compute the weight from others
                raise ValueError(f"{name}.weight is no parameter; leave this layer out of the selection")
            for parameter in child.parameters(recurse=False):
                parameter.data = parameter.data.float()
            role = Role(name, policy.role(RoleKind.OTHER), recorder)
            converted[child] = Linear(weight, bias, role).train(child.training)
        parent_name, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent_name), attribute, converted[child])
    if not converted:
        raise ValueError(f"no nn.Linear inside this {type(module).__name__} was selected")
    return module
