"""What a person can do whose checkpoint is damaged: the last one before it that is whole, and the command for it."""

from pathlib import Path

from tessera.recipe import UserError
from tessera.store import RunFolder
from tessera.training.checkpoint import read_state


def way_back(run: RunFolder, path: Path) -> str:
    """A sentence for the end of the message that refuses the checkpoint `path` of `run`."""
    steps = {place: step for step, place in run.checkpoints()}
    comparison = run.path.resolve().parent.parent
    for step, earlier in reversed(run.checkpoints()):
        if step >= steps.get(path, step + 1) or not _is_whole(earlier):
            continue
        if (comparison / "comparison.json").is_file():  # its arms are resumed together, each from its latest
            return f"remove {path}, and go on from step {step} with:\n  tessera compare --resume {comparison}"
        return f"go on from the checkpoint of step {step} with:\n  tessera train --resume {earlier}"
    return "no checkpoint before it is whole; begin again in another folder with --out"


def _is_whole(path: Path) -> bool:
    try:
        read_state(path)
    except UserError:
        return False
    return True
