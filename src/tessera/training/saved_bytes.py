"""What backward really keeps: the memory of saved tensors, measured with autograd's own hooks.

Memory is counted once, by storage, however many tensors and ops share it; parameters are left out, they live anyway.
`measure_step` runs the forward pass and the losses of one micro-batch of a recipe on random tokens; `measure_layer`
one layer with experts alone, beside the same layer in plain PyTorch and that of transformers, where it is installed.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tessera.accounting import memory
from tessera.data import Batch
from tessera.model import Transformer
from tessera.model.layer import Layer
from tessera.model.plain_layer import PlainLayer
from tessera.numerics import Policy
from tessera.ops.keep import Keep
from tessera.recipe import ModelSection, Recipe, UserError
from tessera.training.loss import Share, training_loss

REST = "rest"  # what no layer's attention or MLP keeps: embedding, final norm, head, what joins MTP's inputs


class SavedBytes:
    """Counts, inside `counting`, the bytes that autograd keeps, by the module that keeps them first."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = Counter[str]()
        self._where = [REST]
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._alive: list[Tensor] = []  # so that no address is used twice

    @contextmanager
    def counting(self) -> Iterator["SavedBytes"]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield self

    def watch(self, name: str, module: nn.Module) -> None:
        """Count what `module` keeps in its forward under `name`."""
        module.register_forward_pre_hook(lambda *_: self._where.append(name))

        def leave(*_: Any) -> None:
            self._where.pop()

        module.register_forward_hook(leave)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._alive.append(tensor)
            self.bytes[self._where[-1]] += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one micro-batch of `tokens` tokens keeps: `layers[i]` by attention and MLP of layer i."""

    tokens: int
    layers: list[int]
    rest: int

    @property
    def total(self) -> int:
        return sum(self.layers) + self.rest


@dataclass(frozen=True)
class LayerBytes:
    """Bytes a token that one layer with experts keeps. `transformers` is None where that is not installed."""

    tokens: int
    tessera: float
    plain: float
    transformers: float | None

    @property
    def ratio(self) -> float:
        """Of tessera's bytes to those of plain PyTorch in BF16."""
        return self.tessera / self.plain

    @property
    def ratio_to_transformers(self) -> float | None:
        """Of tessera's bytes to those of transformers' layer in BF16."""
        return None if self.transformers is None else self.tessera / self.transformers


def measure_step(recipe: Recipe) -> StepBytes:
    """One micro-batch of the recipe; raises UserError where the model does not fit this machine's free memory."""
    _require_memory(recipe)
    section = recipe.model
    model = _model(recipe)
    saved = SavedBytes(model)
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, Layer)
        saved.watch(str(i), layer.self_attn)
        saved.watch(str(i), layer.mlp)
    length = recipe.data.sequence_length
    size = memory(recipe).tokens // length
    text = random_tokens(section, size, length + 1)
    documents = torch.zeros(size, length, dtype=torch.int64)
    batch = Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), documents)
    masked = documents if not recipe.data.cross_document_attention else None
    share = Share(size * length, size, recipe.training.mtp_loss_weight.at(0), recipe.training.balance_loss_weight)
    with saved.counting():
        training_loss(model, batch, masked, share)
    layers = [saved.bytes[str(i)] for i in range(len(model.model.layers))]
    return StepBytes(size * length, layers, saved.bytes[REST])


def measure_layer(recipe: Recipe) -> LayerBytes:
    """The recipe's first layer with experts, at its sequence length, on two sequences of random residual stream.

    Raises UserError where the recipe has no layer with experts.
    """
    section = recipe.model
    if not section.num_moe_layers:
        raise UserError(
            f"model.first_k_dense_replace = {section.first_k_dense_replace}: no layer has experts, so there is none "
            "to measure; lower it"
        )
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "vocab_size": 256}
    alone = recipe.model_copy(update={"model": section.model_copy(update=one)})
    _require_memory(alone)
    size, length = 2, recipe.data.sequence_length
    x = torch.randn(size, length, section.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = _model(alone)
    place = model.place(torch.zeros(size, length, dtype=torch.int64), None, None)
    ours = model.model.layers[0]
    rows = x.flatten(0, 1).to(model.policy.activation_dtype)
    plain, theirs = PlainLayer(alone.model), transformers_layer(alone.model, length)
    return LayerBytes(
        size * length,
        _bytes_a_token(ours, rows, lambda x: ours(x, place)),
        _bytes_a_token(plain, x, plain),
        _bytes_a_token(theirs[0], x, theirs[1]) if theirs else None,
    )


def _bytes_a_token(module: nn.Module, x: Tensor, forward: Callable[[Tensor], Any]) -> float:
    saved = SavedBytes(module)
    with saved.counting():
        forward(x.detach().clone().requires_grad_())
    return saved.bytes[REST] / (x.numel() // x.shape[-1])


def _model(recipe: Recipe) -> Transformer:
    policy, keep = Policy(**recipe.numerics.model_dump()), Keep(**recipe.memory.model_dump())
    return Transformer(recipe.model, policy, keep=keep)


def random_tokens(section: ModelSection, size: int, length: int) -> Tensor:
    return torch.randint(section.vocab_size, (size, length), generator=torch.Generator().manual_seed(0))


def _require_memory(recipe: Recipe) -> None:
    found = memory(recipe)
    needed = found.masters + found.operands + found.saved
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise UserError(
            f"{recipe.name}: measuring takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free here; leave "
            "--measure out for the prediction alone, or make the model smaller with --set"
        )


def transformers_layer(section: ModelSection, length: int) -> tuple[nn.Module, Callable[[Tensor], Any]] | None:
    """transformers' layer with experts in BF16 and its forward pass, or None where it is not installed."""
    try:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
            DeepseekV3DecoderLayer,
            DeepseekV3RotaryEmbedding,
        )
    except ImportError:
        return None
    fields = section.model_dump(exclude={"rope_scaling", "rope_theta", "scoring_func", "topk_method"})
    fields |= {
        "num_key_value_heads": section.num_attention_heads,
        "rope_parameters": {"rope_theta": section.rope_theta, "rope_type": "default"},
        "attn_implementation": "sdpa",  # these two are what a whole model takes by default
        "experts_implementation": "grouped_mm",
    }
    config = DeepseekV3Config(**fields)
    layer = DeepseekV3DecoderLayer(config, layer_idx=0).bfloat16().train()
    rotary = DeepseekV3RotaryEmbedding(config)

    def forward(x: Tensor) -> Any:
        positions = torch.arange(length)[None].expand(x.shape[0], -1)
        return layer(x, position_embeddings=rotary(x, positions), attention_mask=None, position_ids=positions)

    return layer, forward
