"""The weights of a model: FP32 masters and routing biases, under the model's own names.

What is shared (MTP's embedding and head are the trunk's) stands in a checkpoint once.
"""

from pathlib import Path

from torch import Tensor, nn

from tessera.accounting import parameters
from tessera.model.tensor_folder import read_tensors
from tessera.recipe import ModelSection, UserError
from tessera.store.checkpoint_path import TENSORS, WEIGHTS


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of `model` by name, detached; the model's own memory."""
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    kept = model.state_dict().keys()
    tensors.update((name, b) for name, b in model.named_buffers() if name in kept)
    return tensors


def read_weights(checkpoint: Path, model: nn.Module, part: str = WEIGHTS) -> None:
    """Take the weights of a checkpoint whose manifest has been verified; `part` is the folder in it."""
    read_tensors(checkpoint / part, weights(model))


def require_bytes_of(checkpoint: Path, section: ModelSection, part: str = WEIGHTS) -> None:
    """Raise UserError where a checkpoint is too small for the model of its own recipe.

    For those who make the model by that recipe: a false one must not make them allocate more than there is to read.
    """
    counts = parameters(section)
    owed, found = 4 * (counts.total + counts.mtp_total), (checkpoint / part / TENSORS).stat().st_size
    if owed > found:
        raise UserError(
            f"{checkpoint / part / TENSORS}: has {found} bytes, but the model of the recipe beside it needs {owed}; "
            "the checkpoint is damaged"
        )
