"""The weights of a model as a safetensors file: FP32 masters and routing biases, under the model's own names.

What is shared (MTP's embedding and head are the trunk's) stands in the file once. A file is taken only if it has
exactly the tensors of the model, in their shapes and dtypes; it is looked through before the first value is copied.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tessera.recipe import UserError


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of `model` by name, detached; the model's own memory."""
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    kept = model.state_dict().keys()
    tensors.update((name, b) for name, b in model.named_buffers() if name in kept)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file; raises UserError where the disk refuses."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


@torch.no_grad()
def read_tensors(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file into `targets`; raises UserError naming the first tensor that is not as expected."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for name, target in targets.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise UserError(f"{path}: has no tensor {name}, which the recipe's model has")
        if tensor.shape != target.shape or tensor.dtype != target.dtype:
            raise UserError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but the recipe's model has "
                f"{target.dtype} {tuple(target.shape)}"
            )
    if unknown := sorted(set(tensors) - set(targets)):
        raise UserError(f"{path}: has a tensor {unknown[0]}, which the recipe's model has not")
    for name, target in targets.items():
        target.copy_(tensors[name])


def read_weights(checkpoint: Path, model: nn.Module) -> None:
    """Take the weights of a checkpoint folder whose manifest has been verified."""
    read_tensors(checkpoint / "model.safetensors", weights(model))
