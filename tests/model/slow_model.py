"""The architecture once more: float64, plain loops, published weight names; shares no code with tessera.model.

Written from the DeepSeek-V3 report (sections 2.1 and 2.2) and the published config's meaning. One sequence at a time.
"""

import math

import torch
from torch import Tensor

from tessera.recipe import ModelSection

State = dict[str, Tensor]


def float64(state: State) -> State:
    return {name: tensor.detach().double() for name, tensor in state.items()}


def rms(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return torch.stack([row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + epsilon) * gain for row in x])


def frequencies(section: ModelSection) -> list[float]:
    width, theta = section.qk_rope_head_dim, section.rope_theta
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    yarn = section.rope_scaling
    if yarn is None:
        return plain

    def pair_with(turns: float) -> float:  # theta^(-2 i / R) * context = 2 pi turns, solved for i
        return math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta) * width / 2

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
    result = []
    for i, frequency in enumerate(plain):
        slowed = (i - low) / (high - low) if high != low else (0.0 if i <= low else 1.0)
        slowed = min(max(slowed, 0.0), 1.0)
        result.append(frequency / yarn.factor * slowed + frequency * (1 - slowed))
    return result


def magnitude(section: ModelSection, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(section.rope_scaling.factor) + 1 if section.rope_scaling else 1.0


def turned(x: Tensor, position: int, section: ModelSection) -> Tensor:
    yarn = section.rope_scaling
    factor = magnitude(section, yarn.mscale) / magnitude(section, yarn.mscale_all_dim) if yarn else 1.0
    out = []
    for i, frequency in enumerate(frequencies(section)):
        a, b, angle = float(x[2 * i]), float(x[2 * i + 1]), position * frequency
        out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.tensor(out, dtype=torch.float64) * factor


def attention(x: Tensor, state: State, name: str, section: ModelSection, documents: list[int]) -> Tensor:
    heads, nope, value = section.num_attention_heads, section.qk_nope_head_dim, section.v_head_dim
    yarn = section.rope_scaling
    scale = (nope + section.qk_rope_head_dim) ** -0.5
    if yarn is not None:
        scale *= magnitude(section, yarn.mscale_all_dim) ** 2
    queries, keys, values = [], [], []
    for position, row in enumerate(x):
        if section.q_lora_rank is None:
            q = state[f"{name}.q_proj.weight"] @ row
        else:
            latent = state[f"{name}.q_a_proj.weight"] @ row
            latent = rms(latent[None], state[f"{name}.q_a_layernorm.weight"], 1e-6)[0]
            q = state[f"{name}.q_b_proj.weight"] @ latent
        down = state[f"{name}.kv_a_proj_with_mqa.weight"] @ row
        latent = rms(down[None, : section.kv_lora_rank], state[f"{name}.kv_a_layernorm.weight"], 1e-6)[0]
        kv = (state[f"{name}.kv_b_proj.weight"] @ latent).view(heads, nope + value)
        shared_key = turned(down[section.kv_lora_rank :], position, section)
        q = q.view(heads, -1)
        queries.append([torch.cat([q[h, :nope], turned(q[h, nope:], position, section)]) for h in range(heads)])
        keys.append([torch.cat([kv[h, :nope], shared_key]) for h in range(heads)])
        values.append([kv[h, nope:] for h in range(heads)])
    out = []
    for i in range(len(x)):
        seen = [j for j in range(i + 1) if documents[j] == documents[i]]
        parts = []
        for h in range(heads):
            scores = torch.stack([queries[i][h] @ keys[j][h] for j in seen]) * scale
            share = torch.softmax(scores, 0)
            parts.append(sum(share[n] * values[j][h] for n, j in enumerate(seen)))
        out.append(state[f"{name}.o_proj.weight"] @ torch.cat(parts))
    return torch.stack(out)


def gated(x: Tensor, state: State, name: str) -> Tensor:
    gate, up = state[f"{name}.gate_proj.weight"] @ x, state[f"{name}.up_proj.weight"] @ x
    return state[f"{name}.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def chosen_experts(affinity: list[float], bias: list[float], section: ModelSection) -> list[int]:
    """Best biased affinity first."""
    biased = [s + b for s, b in zip(affinity, bias, strict=True)]
    size = section.n_routed_experts // section.n_group
    score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(section.n_group)]
    groups = sorted(range(section.n_group), key=lambda g: -score[g])[: section.topk_group]
    allowed = [e for e in range(section.n_routed_experts) if e // size in groups]
    return sorted(allowed, key=lambda e: -biased[e])[: section.num_experts_per_tok]


def routing_weights(affinity: list[float], experts: list[int], section: ModelSection) -> list[float]:
    total = sum(affinity[e] for e in experts) if section.norm_topk_prob else 1.0
    return [affinity[e] / total * section.routed_scaling_factor for e in experts]


def mixture(x: Tensor, state: State, name: str, section: ModelSection) -> Tensor:
    out = []
    for row in x:
        affinity = [1 / (1 + math.exp(-v)) for v in (state[f"{name}.gate.weight"] @ row).tolist()]
        experts = chosen_experts(affinity, state[f"{name}.gate.e_score_correction_bias"].tolist(), section)
        y = torch.zeros_like(row)
        if section.n_shared_experts:
            y += gated(row, state, f"{name}.shared_experts")
        for expert, weight in zip(experts, routing_weights(affinity, experts, section), strict=True):
            y += weight * gated(row, state, f"{name}.experts.{expert}")
        out.append(y)
    return torch.stack(out)


def layer(x: Tensor, state: State, index: int, section: ModelSection, documents: list[int]) -> Tensor:
    name, epsilon = f"model.layers.{index}", section.rms_norm_eps
    y = rms(x, state[f"{name}.input_layernorm.weight"], epsilon)
    x = x + attention(y, state, f"{name}.self_attn", section, documents)
    y = rms(x, state[f"{name}.post_attention_layernorm.weight"], epsilon)
    if index < section.first_k_dense_replace:
        return x + torch.stack([gated(row, state, f"{name}.mlp") for row in y])
    return x + mixture(y, state, f"{name}.mlp", section)


def trunk(tokens: list[int], state: State, section: ModelSection, documents: list[int] | None = None) -> Tensor:
    """-> the output after the final norm [L, H]."""
    x = torch.stack([state["model.embed_tokens.weight"][t] for t in tokens])
    for index in range(section.num_hidden_layers):
        x = layer(x, state, index, section, documents or [0] * len(tokens))
    return rms(x, state["model.norm.weight"], section.rms_norm_eps)


def mtp(
    carry: Tensor, next_tokens: list[int], state: State, section: ModelSection, depth: int
) -> tuple[Tensor, Tensor]:
    """-> (logits [L, V], what block depth + 1 takes [L, H])."""
    index = section.num_hidden_layers + depth - 1
    name, epsilon = f"model.layers.{index}", section.rms_norm_eps
    rows = []
    for h, token in zip(carry, next_tokens, strict=True):
        embedded = rms(state["model.embed_tokens.weight"][token][None], state[f"{name}.enorm.weight"], epsilon)[0]
        previous = rms(h[None], state[f"{name}.hnorm.weight"], epsilon)[0]
        rows.append(state[f"{name}.eh_proj.weight"] @ torch.cat([embedded, previous]))
    x = layer(torch.stack(rows), state, index, section, [0] * len(rows))
    return rms(x, state[f"{name}.shared_head.norm.weight"], epsilon) @ state["lm_head.weight"].T, x
