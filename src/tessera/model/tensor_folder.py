"""Named tensors in a folder, written and read by torch.distributed.checkpoint in Hugging Face's form.

    model-00001-of-00001.safetensors   the tensors
    model.safetensors.index.json       which file holds which of them

torch.distributed.checkpoint because a sharded state goes through it unchanged; its safetensors storage because the
default one unpickles its metadata, and what is unpickled is executed. A folder is taken only if it has exactly the
tensors that are asked for, in their shapes and dtypes: `check_tensors` looks through the header before the library
opens the file, and no value is copied before that.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tessera.recipe import UserError
from tessera.store.checkpoint_path import TENSORS
from tessera.store.files import unwritable
from tessera.store.tensor_header import read_header

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_SUFFIX = ".safetensors"
_OFFSETS = "DCP_SHARDING_INFO"  # the library's note on which part of a tensor the file holds
_HEADER, _ENTRY = 2**20, 1024  # bytes of a header: some, and more for each tensor


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> None:
    """Write tensors into a new folder and bring them to the disk; raises UserError where the disk refuses.

    `group`: all its ranks call this with the same names; the first of them writes what all have whole.
    """
    _expect_one_process()
    storage = dcp.HuggingFaceStorageWriter(str(folder))
    try:
        # Two ranks with half of the tensors each would write the same file.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        dcp.save(
            {name: t.contiguous() for name, t in tensors.items()},
            storage_writer=storage,
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as wrapped:  # no Exception, and its message is a traceback
        error = next(iter(wrapped.failures.values()))[0]
        if isinstance(error, OSError):
            raise unwritable(folder / TENSORS, error) from error
        raise error from None


def check_tensors(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first tensor of a folder that is not as in `targets`, or what is wrong with the file.

    Nothing is allocated by a size that stands in the file.
    """
    path = folder / TENSORS
    try:
        others = [other.name for other in folder.iterdir() if other.name.endswith(_SUFFIX) and other != path]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    if others:  # the library would read it
        raise UserError(f"{folder / others[0]}: does not belong there; remove it")
    header = read_header(path, _HEADER + _ENTRY * len(targets))
    for name, target in targets.items():
        if name not in header.tensors:
            raise UserError(f"{path}: has no tensor {name}, which the recipe's model has")
        code, shape = header.tensors[name]
        if shape != tuple(target.shape) or DTYPES[code] != target.dtype:
            raise UserError(
                f"{path}: {name} is {DTYPES[code]} {shape}, but the recipe's model has {target.dtype} "
                f"{tuple(target.shape)}"
            )
    if unknown := sorted(set(header.tensors) - set(targets)):
        raise UserError(f"{path}: has a tensor {unknown[0]}, which the recipe's model has not")
    whole = {name: {"saved_offsets": [0] * target.dim()} for name, target in targets.items()}
    if _OFFSETS in header.metadata and _offsets(path, header.metadata[_OFFSETS]) != whole:
        raise UserError(f"{path}: cannot be read: {_OFFSETS} does not say that it holds whole tensors")


@torch.no_grad()
def read_tensors(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a folder into `targets`, after `check_tensors`; raises UserError."""
    check_tensors(folder, targets)
    _expect_one_process()
    try:
        dcp.load(dict(targets), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as wrapped:
        error = next(iter(wrapped.failures.values()))[0]
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"{folder / TENSORS}: cannot be read: {error}") from error
        raise error from None


def _expect_one_process() -> None:
    """The library warns whenever it is told so, which is how a single process says what it means."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _offsets(path: Path, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: cannot be read: {_OFFSETS} is no JSON") from None
