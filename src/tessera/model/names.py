"""Weights under the names of the published checkpoint, out of a model and into one.

Here gate_proj and up_proj are one matrix and experts are stacked; there each is a tensor of its own. MTP blocks
repeat the embedding and the head there (`model.layers.61.embed_tokens.weight`, `...shared_head.head.weight`),
though they are the trunk's.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tessera.model.experts import GatedMlp, RoutedExperts
from tessera.model.transformer import Transformer
from tessera.recipe.errors import UserError


def hugging_face_state(model: Transformer) -> dict[str, Tensor]:
    """Published name -> float32 tensor, a view of the model's own: of every parameter and routing bias."""
    return dict(_published(model)) | dict(_repeated(model))


def load_hugging_face(model: Transformer, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a published checkpoint into `model`, as float32.

    MTP's repeated embedding and head may be left out; given, they must equal the trunk's. UserError names the first
    tensor that is missing, unknown, of another shape or not equal; the model is then unchanged.
    """
    targets, repeated = dict(_published(model)), dict(_repeated(model))
    for name in state:
        if name not in targets and name not in repeated:
            raise UserError(f"{name}: no such tensor in this model; does the recipe's [model] match the checkpoint?")
    for name, target in targets.items():
        if name not in state:
            raise UserError(f"{name}: missing in the checkpoint; this model needs {tuple(target.shape)}")
        if state[name].shape != target.shape:
            raise UserError(f"{name}: shape {tuple(state[name].shape)}, this model needs {tuple(target.shape)}")
    for name in repeated.keys() & state.keys():
        own = "model.embed_tokens.weight" if name.endswith("embed_tokens.weight") else "lm_head.weight"
        if not torch.equal(state[name], state[own]):
            raise UserError(f"{name}: differs from {own}; MTP shares the trunk's embedding and head here")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state[name])


def _published(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model once, cut into the published pieces."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        module = modules[owner]
        if isinstance(module, RoutedExperts):
            for expert, matrix in enumerate(tensor):
                yield from _matrices(f"{owner}.{expert}", leaf, matrix)
        elif isinstance(module, GatedMlp):
            yield from _matrices(owner, leaf, tensor)
        else:
            yield name, tensor


def _matrices(owner: str, leaf: str, matrix: Tensor) -> Iterator[tuple[str, Tensor]]:
    if leaf != "gate_up_proj":
        yield f"{owner}.{leaf}.weight", matrix
        return
    gate, up = matrix.chunk(2)
    yield f"{owner}.gate_proj.weight", gate
    yield f"{owner}.up_proj.weight", up


def _repeated(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    section = model.section
    for k in range(section.num_nextn_predict_layers):
        block = f"model.layers.{section.num_hidden_layers + k}"
        yield f"{block}.embed_tokens.weight", model.model.embed_tokens.weight.detach()
        yield f"{block}.shared_head.head.weight", model.lm_head.weight.detach()
