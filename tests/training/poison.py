"""A batch that hurts: one of its sequences makes NaN, or a loss that leaps, wherever the model meets its tokens."""

from typing import Any

import torch
from torch import Tensor

from tessera.data import Dataset
from tessera.model import Output
from tessera.recipe import Recipe
from tessera.training.trainer import Trainer

ROW = 2  # of the batch


def position_of(recipe: Recipe, step: int) -> int:
    return sum(recipe.batch_size_at(earlier) for earlier in range(step))


def poisoned_sequence(recipe: Recipe, dataset: Dataset, step: int) -> Tensor:
    """The tokens [L] of the sequence that hurts in a step."""
    return dataset.train.batch(position_of(recipe, step) + ROW, 1).tokens[0]


def poison(trainer: Trainer, leaps: dict[int, float], nans: tuple[int, ...] = ()) -> Trainer:
    """Steps of `leaps`: the sequence's last hidden states are multiplied; of `nans`: NaN behind the first layer."""

    def sequences(steps: Any) -> dict[int, Tensor]:
        return {step: poisoned_sequence(trainer.recipe, trainer.dataset, step) for step in steps}

    leaping, breaking = sequences(leaps), sequences(nans)
    seen: list[Tensor] = [torch.empty(0)]

    def rows(known: Tensor) -> Tensor:
        return (seen[0] == known).all(dim=1)

    def look(module: Any, arguments: Any) -> None:
        seen[0] = arguments[0]

    def leap(module: Any, arguments: Any, output: Output) -> Output:
        hidden = output.hidden
        for step, known in leaping.items():
            if rows(known).any():
                hidden = torch.where(rows(known)[:, None, None], hidden * leaps[step], hidden)
        return Output(hidden, output.carry, output.router)

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        hurt = torch.stack([rows(known) for known in breaking.values()]).any(dim=0)
        if not hurt.any():
            return output
        return torch.where(hurt.repeat_interleave(seen[0].shape[1])[:, None], torch.nan, output[0]), output[1]

    trainer.model.register_forward_pre_hook(look)
    if leaps:
        trainer.model.register_forward_hook(leap)
    if nans:
        trainer.model.model.layers[0].register_forward_hook(spoil)
    return trainer
