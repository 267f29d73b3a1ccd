"""Which checkpoint a person means: a path may name one, the run it belongs to, or a comparison of runs."""

from pathlib import Path

from tessera.recipe import UserError
from tessera.store.manifest import MANIFEST
from tessera.store.run_folder import RunFolder

WEIGHTS = "model.safetensors"
EMA = "ema.safetensors"  # the moving average of the weights, where the recipe keeps one


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the latest one of the run, or of a comparison's FP8 arm.

    Raises UserError where there is none.
    """
    if (path / MANIFEST).is_file() and (path / WEIGHTS).is_file():
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
