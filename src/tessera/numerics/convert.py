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
    Weights shared with a module that is not an nn.Linear (tied embeddings) belong out of the selection.
    """
    policy, recorder = policy or Policy(), recorder or Recorder()
    select = select or (lambda name, _: name.rsplit(".", 1)[-1] != "lm_head")
    for name, child in list(module.named_modules()):
        if not isinstance(child, nn.Linear) or not select(name, child) or not name:
            continue
        for parameter in child.parameters(recurse=False):
            parameter.data = parameter.data.float()
        parent_name, _, attribute = name.rpartition(".")
        role = Role(name, policy.role(RoleKind.OTHER), recorder)
        setattr(module.get_submodule(parent_name), attribute, Linear(child.weight, child.bias, role))
    return module
