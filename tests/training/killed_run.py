"""A training run in a process of its own, to be killed; the process comes from a server that has torch loaded."""

import multiprocessing
import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from tessera.data import Dataset, prepare
from tessera.recipe import Recipe, load_recipe
from tessera.store import RunFolder
from tessera.training import checkpoint
from tessera.training.trainer import Trainer

LIMIT = 60.0  # seconds


def process_of(recipe: Path, folder: Path, resume: Path | None, pause: float) -> ForkServerProcess:
    """Start the run of a recipe file in `folder`, or go on with it; `pause` seconds before each write of a save."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=train, args=(recipe, folder, resume, pause))
    process.start()
    return process


def train(recipe: Path, folder: Path, resume: Path | None, pause: float) -> None:
    """Begin the run where there is none, and go on with it from its latest checkpoint, or from `resume`."""
    torch.set_num_threads(1)
    for name in ("write_tensors", "write_json", "publish_folder", "discard") if pause else ():
        setattr(checkpoint, name, _after(pause, getattr(checkpoint, name)))
    loaded = load_recipe(recipe)
    dataset = dataset_of(loaded)
    run, found = None, resume
    if (folder / "run.json").is_file():
        run = RunFolder.open(folder)
        found = found or checkpoint.latest_to_resume(run)
    if run and found:
        trainer = Trainer.resume(run, dataset, found)
    else:  # killed before its first checkpoint
        shutil.rmtree(folder, ignore_errors=True)
        trainer = Trainer(loaded, RunFolder.create(folder, loaded), dataset)
    trainer.run()


def dataset_of(recipe: Recipe) -> Dataset:
    """The data that the recipe keeps in its cache."""
    assert recipe.data.cache is not None
    return prepare(recipe.data, recipe.model.vocab_size, Path(recipe.data.cache))


def _after(pause: float, work: Callable[..., Any]) -> Callable[..., Any]:
    def paused(*arguments: Any, **options: Any) -> Any:
        time.sleep(pause)
        return work(*arguments, **options)

    return paused
