"""The whole model: embedding, layers, final norm, output head, MTP blocks.

Parameters are FP32 masters under Hugging Face's names; MTP block k (from 0) is model.layers.{num_hidden_layers + k}.
gate_proj and up_proj are stored as one `gate_up_proj`, experts stacked; `names.py` gives and takes the published
form. In which numbers it computes is the policy's decision alone.

Shapes: B sequences, L positions, T = B * L, H hidden, V vocabulary, k experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.model.attention import Place, document_starts
from tessera.model.blueprint import Blueprint
from tessera.model.experts import MixtureOfExperts
from tessera.model.initialise import initialise
from tessera.model.layer import Layer
from tessera.model.mtp import MtpBlock
from tessera.model.projection import Norm
from tessera.model.rope import rotation
from tessera.model.router import Router, Routing
from tessera.numerics import Policy, Recorder
from tessera.ops.chunked_loss import head_logits
from tessera.ops.dispatch import Dispatcher, LocalDispatcher
from tessera.ops.keep import Keep
from tessera.ops.rms_norm import rms_norm
from tessera.recipe.model import ModelSection


@dataclass(frozen=True)
class Output:
    """hidden [B, L, H] after the norm, ready for the head; carry [B, L, H]: what the next draft takes; router: the
    routings in the order of the layers that have experts."""

    hidden: Tensor
    carry: Tensor
    router: list[Routing]


class TokenTable(nn.Module):
    """`weight` float32 [V, H]: the embedding, or the output head."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden, dtype=torch.float32))


class Trunk(nn.Module):
    """The module `model`: embedding, layers (MTP blocks last), final norm."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        section = blueprint.section
        layers: list[Layer] = [
            Layer(blueprint, f"model.layers.{i}", dense=i < section.first_k_dense_replace)
            for i in range(section.num_hidden_layers)
        ]
        blocks = range(section.num_hidden_layers, section.num_hidden_layers + section.num_nextn_predict_layers)
        layers += [MtpBlock(blueprint, f"model.layers.{i}") for i in blocks]
        self.embed_tokens = TokenTable(section.vocab_size, section.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(section.hidden_size)


class Transformer(nn.Module):
    """See the module docstring. `seed` fixes the initial weights, whatever the device or the order of building.

    recorder: watches the quantisation. dispatcher: carries tokens to experts (local unless given). keep: what is saved
    for backward (every saving unless given). On device "meta" nothing is allocated.
    """

    def __init__(
        self,
        section: ModelSection,
        policy: Policy,
        *,
        recorder: Recorder | None = None,
        dispatcher: Dispatcher | None = None,
        keep: Keep | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.section = section
        self.policy = policy
        self.recorder = recorder or Recorder()
        self.keep = keep or Keep()
        self.rotation = rotation(section)
        with torch.device(device or "cpu"):
            self.model = Trunk(Blueprint(section, policy, self.recorder, dispatcher or LocalDispatcher(), self.keep))
            self.lm_head = TokenTable(section.vocab_size, section.hidden_size)
        initialise(self, section.initializer_range, seed)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        routing: Sequence[Tensor] | None = None,
    ) -> Output:
        """tokens int64 [B, L] -> Output of the trunk.

        positions: int64 [L] or [B, L], 0 .. L - 1 unless given. document_ids: integer [B, L]; given, attention stays
        inside a document. routing: int64 [T, k] for each layer with experts; replays these choices, with weights from
        the own affinities.
        """
        section = self.section
        place = self.place(tokens, positions, document_ids)
        replayed = iter(self._checked(routing, section.num_moe_layers, tokens) or ())
        x = self._embed(tokens)
        routings: list[Routing] = []
        for layer in list(self.model.layers)[: section.num_hidden_layers]:
            has_experts = isinstance(layer.mlp, MixtureOfExperts)
            x, decided = layer(x, place, next(replayed, None) if has_experts else None)
            if decided is not None:
                routings.append(decided)
        hidden, _ = rms_norm(x, self.model.norm.weight, section.rms_norm_eps, self.keep)
        hidden = hidden.view(*tokens.shape, -1)
        return Output(hidden, hidden, routings)

    def draft(
        self,
        depth: int,
        carry: Tensor,
        next_tokens: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        routing: Sequence[Tensor] | None = None,
    ) -> Output:
        """MTP block `depth` (from 1): carry [B, L, H] of the output before, next_tokens int64 [B, L] = t_{i + depth}.

        The output at position i predicts t_{i + depth + 1}; positions, document_ids and routing (of one layer) as in
        forward.
        """
        blocks = self.section.num_nextn_predict_layers
        if not 1 <= depth <= blocks:
            raise ValueError(f"depth {depth}: the model has {blocks} MTP blocks, counted from 1")
        block = self.model.layers[self.section.num_hidden_layers + depth - 1]
        assert isinstance(block, MtpBlock)
        replayed = self._checked(routing, 1, next_tokens)
        place = self.place(next_tokens, positions, document_ids)
        hidden, carry, decided = block.draft(
            self._embed(next_tokens), carry.flatten(0, 1), place, replayed[0] if replayed else None
        )
        shape = (*next_tokens.shape, -1)
        return Output(hidden.view(shape), carry.view(shape), [decided])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] of an Output -> float32 [..., V]."""
        logits = head_logits(hidden.reshape(-1, hidden.shape[-1]), self.lm_head.weight)
        return logits.view(*hidden.shape[:-1], -1)

    def routers(self) -> list[tuple[str, Router]]:
        """(name of the layer, router) of each layer with experts: the trunk's in order, then the MTP blocks'."""
        return [
            (f"model.layers.{i}", layer.mlp.gate)
            for i, layer in enumerate(self.model.layers)
            if isinstance(layer.mlp, MixtureOfExperts)
        ]

    def _embed(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [T, H]; rounded after the lookup, so that the table's gradient is added up in FP32."""
        rows = torch.nn.functional.embedding(tokens.flatten(), self.model.embed_tokens.weight)
        return rows.to(self.policy.activation_dtype)

    def place(self, tokens: Tensor, positions: Tensor | None, document_ids: Tensor | None) -> Place:
        batch, length = tokens.shape
        if positions is None:
            positions = torch.arange(length, device=tokens.device)
        first = None if document_ids is None else document_starts(document_ids)
        return Place(batch, length, self.rotation.table(positions), first)

    def _checked(self, routing: Sequence[Tensor] | None, layers: int, tokens: Tensor) -> Sequence[Tensor] | None:
        if routing is None:
            return None
        owed = (tokens.numel(), self.section.num_experts_per_tok)
        if len(routing) != layers or any(tuple(experts.shape) != owed for experts in routing):
            given = [tuple(experts.shape) for experts in routing]
            raise ValueError(f"routing: {layers} tensors of shape {owed} are needed, got {given}")
        return routing
