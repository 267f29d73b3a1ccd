"""What every part of one model is built from: its shape, its precision, what it keeps for backward, who watches."""

from dataclasses import dataclass

from tessera.numerics import Policy, Recorder, Role, RoleKind
from tessera.ops.dispatch import Dispatcher
from tessera.ops.keep import Keep
from tessera.recipe.model import ModelSection


@dataclass(frozen=True)
class Blueprint:
    """Shared by all modules of one model; `role` gives each linear layer its name and its Precision."""

    section: ModelSection
    policy: Policy
    recorder: Recorder
    dispatcher: Dispatcher
    keep: Keep

    def role(self, name: str, kind: RoleKind) -> Role:
        """`name` is the layer's path in the model, without `.weight`."""
        return Role(name, self.policy.role(kind), self.recorder)
