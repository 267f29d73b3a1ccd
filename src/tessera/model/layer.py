"""One transformer layer: x += attention(norm(x)); x += mlp(norm(x)), the residual stream in the activations' dtype."""

from torch import Tensor, nn

from tessera.model.attention import LatentAttention, Place
from tessera.model.blueprint import Blueprint
from tessera.model.experts import DenseMlp, MixtureOfExperts
from tessera.model.projection import Norm
from tessera.model.router import Routing


class Layer(nn.Module):
    """`dense`: a gated MLP in place of experts (the first layers)."""

    def __init__(self, blueprint: Blueprint, name: str, *, dense: bool) -> None:
        super().__init__()
        hidden = blueprint.section.hidden_size
        self.epsilon = blueprint.section.rms_norm_eps
        self.input_layernorm = Norm(hidden)
        self.self_attn = LatentAttention(blueprint, f"{name}.self_attn")
        self.post_attention_layernorm = Norm(hidden)
        self.mlp: DenseMlp | MixtureOfExperts = (
            DenseMlp(blueprint, f"{name}.mlp") if dense else MixtureOfExperts(blueprint, f"{name}.mlp")
        )

    def forward(self, x: Tensor, place: Place, replayed: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """x [T, H] -> ([T, H], routing or None for a dense layer); `replayed` int64 [T, k] fixes the experts."""
        delta = self.self_attn(x, self.input_layernorm, place)
        norm = self.post_attention_layernorm
        if isinstance(self.mlp, DenseMlp):
            x, out = self.mlp(x, delta, norm, self.epsilon)
            return x + out, None
        x, out, routing = self.mlp(x, delta, norm, self.epsilon, place.batch, replayed)
        return x + out, routing
