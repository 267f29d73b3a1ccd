"""What a recipe is allowed to say but its author should know: no errors, one sentence each.

They are printed when a run starts. Each names the figure that causes it and what follows from it.
"""

from collections.abc import Iterator, Mapping

from tessera.recipe.model import ModelSection
from tessera.recipe.schedule import Schedule
from tessera.recipe.stability import StabilitySection

TILE = 128  # edge of the published checkpoint's scale blocks


def model_notes(model: ModelSection) -> Iterator[str]:
    """Notes on the architecture alone."""
    yield from _group_score(model)
    if model.num_hidden_layers in (26, 27) and model.q_lora_rank is not None:
        yield (
            f"model.num_hidden_layers = {model.num_hidden_layers} with a q_lora_rank: llama.cpp takes models of 26 "
            "or 27 layers for the Lite ones, which have none, and will not load an exported GGUF rightly"
        )
    if model.rms_norm_eps != 1e-6:
        yield (
            f"model.rms_norm_eps = {model.rms_norm_eps:g}: transformers uses 1e-06 in the norms of the attention's "
            "latents whatever config.json says, so its logits will differ a little from the trained model's"
        )


def _group_score(model: ModelSection) -> Iterator[str]:
    # With one group, or with all groups allowed, the groups' scores select nothing.
    if model.topk_group < model.n_group and model.num_experts_per_tok != 2 * model.topk_group:
        ratio = model.num_experts_per_tok / model.topk_group
        yield (
            "model: a group's score is the sum of its best 2 affinities, as in the published code; the report's "
            f"rule would sum num_experts_per_tok / topk_group = {ratio:g} of them, so the two differ here"
        )


def tile_notes(model: ModelSection) -> Iterator[str]:
    """A note if FP8 weights have edges that are no multiple of 128, for recipes that train in FP8."""
    ragged = {name: size for name, size in _fp8_edges(model).items() if size % TILE}
    if ragged:
        name, size = next(iter(ragged.items()))
        others = f" and {len(ragged) - 1} more" if len(ragged) > 1 else ""
        yield (
            f"model: {name} = {size}{others}: no multiple of {TILE}; transformers cannot load such weights in FP8, so "
            "export them in BF16 for it (tessera, vLLM and SGLang can)"
        )


def _fp8_edges(model: ModelSection) -> Mapping[str, int]:
    """Rows and columns of the weights that FP8 stores, by the words that a recipe has for them."""
    heads, shared = model.num_attention_heads, model.n_shared_experts
    edges = {
        "hidden_size": model.hidden_size,
        "kv_lora_rank": model.kv_lora_rank,
        "kv_lora_rank + qk_rope_head_dim": model.kv_lora_rank + model.qk_rope_head_dim,
        "heads * (qk_nope_head_dim + qk_rope_head_dim)": heads * model.qk_head_dim,
        "heads * (qk_nope_head_dim + v_head_dim)": heads * (model.qk_nope_head_dim + model.v_head_dim),
        "heads * v_head_dim": heads * model.v_head_dim,
        "moe_intermediate_size": model.moe_intermediate_size,
    }
    if model.q_lora_rank is not None:
        edges["q_lora_rank"] = model.q_lora_rank
    if model.first_k_dense_replace:
        edges["intermediate_size"] = model.intermediate_size
    if shared:
        edges["n_shared_experts * moe_intermediate_size"] = shared * model.moe_intermediate_size
    return edges


def schedule_notes(steps: int, schedules: Mapping[str, Schedule]) -> Iterator[str]:
    """A note for every schedule that the run of `steps` steps does not finish."""
    for key, schedule in schedules.items():
        if schedule.steps > steps:
            yield (
                f"{key} describes {schedule.steps} steps, but training.steps = {steps}: "
                f"the run ends at {schedule.at(steps - 1):g}"
            )


def stability_notes(steps: int, stability: StabilitySection) -> Iterator[str]:
    """A note if spikes are to be refused, but the run ends before it can tell one."""
    if stability.on_spike != "note" and steps <= stability.fewest_calm_steps:
        yield (
            f'stability.on_spike = "{stability.on_spike}" has no effect: training.steps = {steps}, and none is a spike '
            f"before {stability.fewest_calm_steps} calm ones (half of stability.spike_window)"
        )
