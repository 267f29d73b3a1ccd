"""[model]: the shape of a DeepSeek-V3-style transformer, in the names of its published config.json.

The names are Hugging Face's, so that a config.json and this section can be read side by side. Five fields can
take one value only: readers of an exported checkpoint need them written out (llama.cpp falls back to softmax
gating where `scoring_func` is missing), and another value is to be refused, not ignored.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tessera.recipe.section import Section


class RopeScaling(Section):
    """YaRN scaling of the rotary frequencies, as in the published config.json (report, section 4.3)."""

    type: Literal["yarn"] = Field("yarn", description="The only method.")
    factor: float = Field(ge=1, description="How many times the original context is stretched (40 in V3).")
    original_max_position_embeddings: int = Field(ge=1, description="Context before the stretch (4096 in V3).")
    beta_fast: float = Field(32.0, gt=0, description="Rotations in the original context above which a frequency stays.")
    beta_slow: float = Field(1.0, gt=0, description="Rotations below which a frequency is divided by the factor.")
    mscale: float = Field(
        1.0,
        ge=0,
        description="With m(x) = 0.1 x ln(factor) + 1: rotary parts are scaled by m(mscale) / m(mscale_all_dim).",
    )
    mscale_all_dim: float = Field(
        1.0, ge=0, description="The softmax scale is multiplied by m(mscale_all_dim) squared."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.beta_slow >= self.beta_fast:
            yield "beta_slow", f"{self.beta_slow:g} must be below beta_fast = {self.beta_fast:g}"


def _zero_is_none(value: Any) -> Any:
    return None if type(value) is int and value == 0 else value


class ModelSection(Section):
    """The architecture: multi-head latent attention, routed and shared experts, multi-token prediction."""

    vocab_size: int = Field(ge=1, description="Tokens the embedding and the head know (129280 in V3).")
    hidden_size: int = Field(ge=1, description="Width of the residual stream (7168 in V3).")
    intermediate_size: int = Field(ge=1, description="Inner width of the dense layers' MLP (18432 in V3).")
    moe_intermediate_size: int = Field(ge=1, description="Inner width of one expert (2048 in V3).")
    num_hidden_layers: int = Field(ge=1, description="Transformer layers, without MTP blocks (61 in V3).")
    num_attention_heads: int = Field(ge=1, description="Attention heads (128 in V3).")
    n_routed_experts: int = Field(ge=2, description="Routed experts in a MoE layer (256 in V3).")
    num_experts_per_tok: int = Field(ge=1, description="Routed experts that a token passes through (8 in V3).")
    n_shared_experts: int = Field(
        1, ge=0, description="Experts every token passes through, built as one MLP of their summed width."
    )
    first_k_dense_replace: int = Field(
        1, ge=0, description="How many of the first layers have a dense MLP in place of experts (3 in V3)."
    )
    n_group: int = Field(1, ge=1, description="Groups the routed experts are split into, in order (8 in V3).")
    topk_group: int = Field(1, ge=1, description="Groups a token may use (4 in V3).")
    routed_scaling_factor: float = Field(1.0, gt=0, description="Factor on the normalised routing weights (2.5 in V3).")
    norm_topk_prob: bool = Field(True, description="Divide a token's routing weights by their sum before the factor.")
    scoring_func: Literal["sigmoid"] = Field("sigmoid", description="From router logits to affinities.")
    topk_method: Literal["noaux_tc"] = Field(
        "noaux_tc", description="Selection by affinity plus a balancing bias, within the best groups."
    )
    kv_lora_rank: int = Field(ge=1, description="Width of the latent that keys and values share (512 in V3).")
    q_lora_rank: Annotated[int | None, BeforeValidator(_zero_is_none)] = Field(
        None, ge=1, description="Width of the queries' latent (1536 in V3); 0 or left out: queries have none."
    )
    qk_nope_head_dim: int = Field(ge=1, description="Width of a head's query and key without position (128 in V3).")
    qk_rope_head_dim: int = Field(
        ge=2, description="Width of the rotary part; its key is shared by all heads (64 in V3)."
    )
    v_head_dim: int = Field(ge=1, description="Width of a head's value (128 in V3).")
    max_position_embeddings: int = Field(4096, ge=1, description="Longest context, in tokens (163840 in V3).")
    rope_theta: float = Field(10000.0, gt=1, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = Field(
        None, description="YaRN stretching of the context, as a table of its own; left out: none."
    )
    num_nextn_predict_layers: int = Field(
        1, ge=0, description="Multi-token prediction: further tokens predicted, one block each; 0: none."
    )
    initializer_range: float = Field(
        0.02, gt=0, description="Standard deviation of the initial weights (0.006 in the report)."
    )
    rms_norm_eps: float = Field(1e-6, gt=0, description="Added to the mean square in every RMSNorm.")
    hidden_act: Literal["silu"] = Field("silu", description="Activation of the gated MLPs.")
    attention_bias: Literal[False] = Field(False, description="The attention's linears have no bias.")
    tie_word_embeddings: Literal[False] = Field(False, description="Embedding and head are separate matrices.")

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's whole query or key: the part without position, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def experts_per_group(self) -> int:
        """Routed experts in one group."""
        return self.n_routed_experts // self.n_group

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, without MTP blocks (which have experts too)."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._routing_problems()
        if self.first_k_dense_replace > self.num_hidden_layers:
            yield (
                "first_k_dense_replace",
                f"{self.first_k_dense_replace} must not exceed num_hidden_layers = {self.num_hidden_layers}",
            )
        if self.qk_rope_head_dim % 2:
            yield "qk_rope_head_dim", f"{self.qk_rope_head_dim} must be even: rotation works on pairs"

    def _routing_problems(self) -> Iterator[tuple[str, str]]:
        experts, groups = self.n_routed_experts, self.n_group
        if self.topk_group > groups:
            yield "topk_group", f"{self.topk_group} must not exceed n_group = {groups}"
            return
        if experts % groups:
            yield "n_group", f"{groups} must divide n_routed_experts = {experts}"
            return
        if self.experts_per_group < 2:
            yield (
                "n_group",
                f"{groups} groups of {experts} experts leave 1 expert a group; a group's score is the sum of "
                f"its best 2, so n_group may be {experts // 2} at most",
            )
        reachable = self.topk_group * self.experts_per_group
        if self.num_experts_per_tok > reachable:
            yield (
                "num_experts_per_tok",
                f"{self.num_experts_per_tok} must not exceed the {reachable} experts of the "
                f"topk_group = {self.topk_group} groups that a token may use",
            )
