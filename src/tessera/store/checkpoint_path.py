"""What a checkpoint's folder holds, and which checkpoint a person means.

A path may name a checkpoint, the run it belongs to, or a comparison of runs.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from tessera.recipe import UserError
from tessera.store.json_text import read_object
from tessera.store.manifest import MANIFEST, verify_manifest
from tessera.store.run_folder import RunFolder

WEIGHTS = "model"
OPTIMIZER = "optimizer"
EMA = "ema"  # the moving average of the weights, where the recipe keeps one
TENSORS = "model-00001-of-00001.safetensors"  # in each of these folders
STATE = "state.json"
TOKENIZER = "tokenizer.json"
RECIPE = "recipe.toml"

_LARGEST = 2**20  # bytes of a recipe, and of a state with its random streams


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the latest one of the run, or of a comparison's FP8 arm.

    Raises UserError where there is none.
    """
    if is_checkpoint(path):
        return path
    for folder in (path, path / "arms" / "fp8"):
        if (folder / "run.json").is_file():
            latest = RunFolder.open(folder).latest_checkpoint()
            if latest is None:
                raise UserError(f"{folder}: the run has no checkpoint yet; wait for its first one")
            return latest[1]
    raise UserError(
        f"{path}: no checkpoint, run or comparison; give a run such as runs/tiny/arms/fp8, or one of its checkpoints, "
        "such as runs/tiny/arms/fp8/checkpoints/step-500"
    )


def is_checkpoint(path: Path) -> bool:
    """Whether a folder was a complete checkpoint once; `verify_checkpoint` says whether it still is."""
    return (path / MANIFEST).is_file() and (path / WEIGHTS).is_dir()


def verify_checkpoint(path: Path, parts: Collection[str] = (WEIGHTS, OPTIMIZER)) -> None:
    """Raise UserError naming the first file that is missing, changed, or larger than such a file can be.

    `parts` are the folders of tensors that must be there.
    """
    verify_manifest(path, (RECIPE, STATE, TOKENIZER, *(f"{part}/{TENSORS}" for part in parts)))
    for name in (RECIPE, STATE):
        if (size := (path / name).stat().st_size) > _LARGEST:
            raise UserError(f"{path / name}: has {size} bytes; such a file has {_LARGEST} at most; it is damaged")


def read_state_file(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's state.json; raises UserError where there is none."""
    return read_object(path / STATE, _LARGEST)
