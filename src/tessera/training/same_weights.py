"""What FP8 does to a loss and to a gradient, on the same weights: no chaos of two training runs, no seeds.

The weights are the BF16 arm's masters at four points of its run; the yardstick is the FP32 arm, in which nothing is
cast. Both see the same held-out batches, once with their own routing and once with the FP32 arm's replayed: where a
token's experts flip, the loss moves by more than rounding, and the share of such tokens is told. Definitions:
docs/numerics.md, "The verdict on FP8".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from tessera.data import Batch
from tessera.model import Transformer
from tessera.model.weights import read_weights
from tessera.numerics import Policy
from tessera.ops.chunked_loss import IGNORED
from tessera.ops.keep import Keep
from tessera.recipe import Recipe
from tessera.training import checkpoint
from tessera.training.arms import arm_recipe
from tessera.training.loss import main_loss

NUM_BATCHES = 16  # held-out batches of the loss error
GRADIENT_BATCHES = 2  # the first of them, for the gradient error
POINTS = (0.25, 0.5, 0.75, 1.0)  # of the run
OUTLIER = 1e5

Progress = Callable[[int, int], None]


def milestones(steps: int) -> list[int]:
    """The steps whose checkpoints the criterion needs."""
    return sorted({max(1, round(steps * point)) for point in POINTS})


@dataclass(frozen=True)
class LossError:
    """Means over the batches of |L - L_fp32| / L_fp32, with own and with replayed routing; share of tokens rerouted."""

    free: float
    replayed: float
    rerouted: float


@dataclass(frozen=True)
class GradientError:
    """|g - g_fp32| / |g_fp32| over all parameters and of the worst tensor; bias <g, g_fp32> / |g_fp32|^2 - 1."""

    error: float
    bias: float
    worst_name: str
    worst_error: float


@dataclass(frozen=True)
class Yardstick:
    """The FP32 arm's answer on each batch: mean loss, and the experts of each layer."""

    losses: list[float]
    routing: list[list[Tensor]]


class SameWeights:
    """Models of several arms over one set of weights. `load` puts a checkpoint into all of them.

    Two models are kept, the FP32 arm's and the one used last: however many arms are measured, memory is that of two.
    """

    def __init__(self, recipe: Recipe, batches: Sequence[Batch]) -> None:
        self.recipe, self.batches = recipe, list(batches)
        self.masked = not recipe.data.cross_document_attention
        self._models: dict[str, Transformer] = {}
        self._path: Path | None = None
        self._outlier = False

    def load(self, path: Path, *, outlier: bool = False) -> None:
        """Take the weights of a checkpoint; `outlier`: with one channel scaled by 1e5, see `add_outlier`."""
        checkpoint.read_state(path)
        self._path, self._outlier = path, outlier
        for model in self._models.values():
            self._fill(model)

    def model(self, arm: str) -> Transformer:
        """The arm's model, with the loaded weights."""
        if arm not in self._models:
            self._models = {name: model for name, model in self._models.items() if name == "fp32"}
            recipe = arm_recipe(self.recipe, arm)
            policy, keep = Policy(**recipe.numerics.model_dump()), Keep(**recipe.memory.model_dump())
            self._models[arm] = Transformer(recipe.model, policy, keep=keep)
            self._fill(self._models[arm])
        return self._models[arm]

    def _fill(self, model: Transformer) -> None:
        if self._path is not None:
            read_weights(self._path, model)
            if self._outlier:
                add_outlier(model)

    @torch.no_grad()
    def yardstick(self, arm: str = "fp32", batches: Sequence[Batch] | None = None) -> Yardstick:
        """Losses and routing of the arm that others are held against."""
        losses, routing = [], []
        for batch in self.batches if batches is None else batches:
            loss, experts = self._forward(arm, batch, None)
            losses.append(float(loss))
            routing.append(experts)
        return Yardstick(losses, routing)

    @torch.no_grad()
    def loss_error(
        self,
        arm: str,
        against: Yardstick,
        batches: Sequence[Batch] | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> LossError:
        """The arm's loss error on the same weights and batches as `against`."""
        free, replayed, changed, tokens = [], [], 0, 0
        for batch, exact, routing in zip(
            self.batches if batches is None else batches, against.losses, against.routing, strict=True
        ):
            loss, experts = self._forward(arm, batch, None)
            free.append(abs(float(loss) - exact) / exact)
            changed += rerouted(experts, routing)
            tokens += batch.tokens.numel()
            if routing:
                loss, _ = self._forward(arm, batch, routing)
            replayed.append(abs(float(loss) - exact) / exact)
            progress()
        return LossError(fmean(free), fmean(replayed), changed / tokens)

    def gradient(self, arm: str, routing: Sequence[Sequence[Tensor]] | None) -> dict[str, Tensor]:
        """Gradient of the mean loss of the first batches, MTP and balance loss off; own routing where None is given."""
        model = self.model(arm)
        model.zero_grad(set_to_none=True)
        batches = self.batches[:GRADIENT_BATCHES]
        for i, batch in enumerate(batches):
            loss, _ = self._forward(arm, batch, routing[i] if routing else None)
            (loss / len(batches)).backward()
        gradient = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return gradient

    def _forward(self, arm: str, batch: Batch, routing: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        model = self.model(arm)
        ids = batch.document_ids if self.masked else None
        output = model(batch.tokens, document_ids=ids, routing=routing)
        positions = max(int((batch.targets != IGNORED).sum()), 1)
        return main_loss(model, output, batch.targets) / positions, [r.experts for r in output.router]


def gradient_error(gradient: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> GradientError:
    """Compare two gradients of the same parameters, in float64."""
    difference = norm = inner = 0.0
    worst = ("", 0.0)
    for name, reference in exact.items():
        g, e = gradient[name].double(), reference.double()
        own, size = float((g - e).square().sum()), float(e.square().sum())
        difference, norm, inner = difference + own, norm + size, inner + float((g * e).sum())
        if size and (own / size) ** 0.5 > worst[1]:
            worst = (name, (own / size) ** 0.5)
    return GradientError((difference / norm) ** 0.5, inner / norm - 1, *worst)


def rerouted(experts: Sequence[Tensor], reference: Sequence[Tensor]) -> int:
    """Tokens whose set of experts differs in at least one layer; both lists hold int64 [T, k], a tensor a layer."""
    if not experts:
        return 0
    changed = [
        (a.sort(dim=-1).values != b.sort(dim=-1).values).any(dim=-1) for a, b in zip(experts, reference, strict=True)
    ]
    return int(torch.stack(changed).any(dim=0).sum())


@torch.no_grad()
def add_outlier(model: Transformer) -> None:
    """Scale one channel of an MLP's inner activation by 1e5, and undo it behind: the dense MLP's, where there is one,
    else the shared expert's, else one of every routed expert of the first layer.

    The up projection's row grows, the down projection's column shrinks: in exact arithmetic the function is the same.
    """
    parameters = dict(model.named_parameters())
    kinds = (r"mlp\.gate_up_proj\.weight", r"mlp\.shared_experts\.gate_up_proj\.weight", r"mlp\.experts\.gate_up_proj")
    found = (name for kind in kinds for name in parameters if re.search(kind + "$", name))
    up_name = next(found)
    gate_up, down = parameters[up_name], parameters[up_name.replace("gate_up_proj", "down_proj")]
    for expert_up, expert_down in zip(_matrices(gate_up), _matrices(down), strict=True):
        up = expert_up[expert_up.shape[0] // 2 :]
        channel = int(up.norm(dim=1).argmax())  # a channel that is used
        up[channel].mul_(OUTLIER)
        expert_down[:, channel].div_(OUTLIER)


def _matrices(weight: Tensor) -> list[Tensor]:
    return list(weight.unbind()) if weight.dim() == 3 else [weight]
