"""Small models and their twins in transformers."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tessera.model import Transformer, load_hugging_face
from tessera.numerics import Policy
from tessera.recipe import ModelSection

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 256,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.15,
}
# Widths beyond a tile and no multiple of one, an odd width for 12-bit codes, two MTP blocks.
BEYOND_A_TILE: dict[str, Any] = {
    "hidden_size": 136,
    "intermediate_size": 200,
    "moe_intermediate_size": 132,
    "v_head_dim": 45,
    "num_nextn_predict_layers": 2,
}
GROUPS: dict[str, Any] = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2}
YARN: dict[str, Any] = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 3.0,
        "beta_slow": 0.5,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}


def section(**changes: Any) -> ModelSection:
    return ModelSection(**(TINY | changes))


def model(section: ModelSection, precision: str = "fp32", seed: int = 0) -> Transformer:
    return Transformer(section, Policy(precision=precision), seed=seed)


def tokens(section: ModelSection, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(section.vocab_size, (batch, length), generator=generator)


def with_biases(model: Transformer, seed: int = 5) -> Transformer:
    """Routing biases of both signs, large enough to change most choices."""
    generator = torch.Generator().manual_seed(seed)
    for _, router in model.routers():
        router.e_score_correction_bias.copy_(torch.randn(router.weight.shape[0], generator=generator) * 2)
    return model


def transformers_twin(section: ModelSection, folder: Path) -> tuple[Any, Transformer]:
    """A transformers model with random weights and routing biases, and ours with the weights it saved."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = section.model_dump(exclude={"rope_scaling", "rope_theta", "scoring_func", "topk_method"})
    rope: dict[str, Any] = {"rope_theta": section.rope_theta, "rope_type": "default"}
    if section.rope_scaling is not None:
        rope |= section.rope_scaling.model_dump(exclude={"type"}) | {"rope_type": "yarn"}
    config = DeepseekV3Config(
        **fields,
        num_key_value_heads=section.num_attention_heads,
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    torch.manual_seed(3)
    theirs = DeepseekV3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 2)
    theirs.save_pretrained(folder)
    ours = model(section)
    load_hugging_face(ours, load_file(folder / "model.safetensors"))
    return theirs, ours


def relative(value: Tensor, exact: Tensor) -> float:
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm())
