"""Continue a text, one token at a time, computing the whole context anew for each: slow, and obviously right.

Numbers are those of training: the same forward, the same FP8 codes. The context is cut to the model's longest one.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tessera.model import Transformer


@torch.no_grad()
def continue_tokens(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Yield token ids that continue `prompt` (at least one id), up to `max_new_tokens`, ending before `stop`.

    temperature 0 takes the most probable token; top_p < 1 draws from the smallest set of that probability (Holtzman
    et al., 2020). The same arguments give the same tokens.
    """
    if not prompt:
        raise ValueError("the prompt holds no token; begin with the end-of-text token")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    longest = model.section.max_position_embeddings
    device = model.lm_head.weight.device
    for _ in range(max_new_tokens):
        context = torch.tensor([tokens[-longest:]], device=device)
        logits = model.logits(model(context).hidden[:, -1])[0]
        token = choose(logits.cpu(), temperature, top_p, generator)
        if token == stop:
            return
        tokens.append(token)
        yield token


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """logits float32 [V] -> a token id; among equally probable ones the greedy choice is the first."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double()
    # The largest is 0 before the division, which then overflows to minus infinity at worst: the greedy choice.
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(0) - ordered >= top_p
        outside[0] = False  # the first token is always inside
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered.masked_fill(outside, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=generator))
