"""[memory]: what is kept for backward, each saving of the DeepSeek-V3 report as one switch.

Five of them change no bit of the gradients; `e5m6_attention_output` and `fp8_swiglu_inputs` round what backward sees.
docs/memory.md has the bytes, the time and the effect on the gradient of each.
"""

from pydantic import Field

from tessera.recipe.section import Section


class MemorySection(Section):
    """Savings of activation memory; the FP8 ones have no effect where nothing is quantised."""

    fp8_linear_inputs: bool = Field(
        True, description="Keep a linear's input as its FP8 codes, not in BF16; the same bits either way."
    )
    e5m6_attention_output: bool = Field(
        True, description="Keep the input of the linear after attention in 12 bits (E5M6); backward sees it rounded."
    )
    fp8_swiglu_inputs: bool = Field(
        True, description="Keep the inputs of SwiGLU in FP8; backward sees them rounded. Its output is never kept."
    )
    recompute_norms: bool = Field(
        True, description="Make RMSNorm's outputs, and the codes made of them, again in backward; the same bits."
    )
    recompute_up_projections: bool = Field(
        True, description="Make queries, keys and values again from the latents of attention; the same bits."
    )
    regather_tokens: bool = Field(
        True,
        description="Gather the experts' tokens again instead of keeping a copy for each expert; the same bits.",
    )
    chunked_head: bool = Field(
        True, description="Make the head's gradients chunk by chunk in forward, and keep no logits; the same bits."
    )
