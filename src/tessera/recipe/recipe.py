"""A recipe: everything that decides a run, in one frozen value, and the rules between its sections.

The same recipe runs on a CPU, a GPU or a cluster; what differs between them (devices, folders, where a run
starts) is said on the command line. `to_toml` writes every field out, so that the copy in a run's folder stays
the same recipe when a default changes.
"""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from tessera.recipe import notes, toml_writer
from tessera.recipe.checkpoint import CheckpointSection
from tessera.recipe.data import DataSection
from tessera.recipe.memory import MemorySection
from tessera.recipe.model import ModelSection
from tessera.recipe.numerics import NumericsSection
from tessera.recipe.optimizer import OptimizerSection
from tessera.recipe.schedule import Schedule
from tessera.recipe.section import Section
from tessera.recipe.stability import StabilitySection
from tessera.recipe.training import TrainingSection

_NAME = re.compile(r"\w[\w .-]*")
SCHEMA = 1  # raised when an older tessera would read a newer recipe wrongly


def _folder_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("must be letters, digits, . _ - and blanks, and begin with a letter, a digit or _")
    return name


class Recipe(Section):
    """One run: its model, numerics, data, optimizer, training and checkpoints."""

    schema_version: int = Field(SCHEMA, alias="schema", ge=1, le=SCHEMA, description="Version of this vocabulary.")
    name: Annotated[str, AfterValidator(_folder_name)] = Field(
        description="Name of the run and of its folder: letters, digits, . _ - and blanks; default: the file's name.",
    )
    model: ModelSection = Field(description="The architecture.")
    numerics: NumericsSection = Field(NumericsSection(), description="Precision and FP8.")
    memory: MemorySection = Field(MemorySection(), description="What is kept for backward.")
    data: DataSection = Field(description="Text, tokenizer and batches.")
    optimizer: OptimizerSection = Field(description="AdamW.")
    training: TrainingSection = Field(description="Steps, losses and intervals.")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="What is saved, when, and what is kept.")
    stability: StabilitySection = Field(
        StabilitySection(), description="Steps that are not finite, and spikes of the loss."
    )

    def to_toml(self) -> str:
        """The recipe with every field written out; `load_recipe` of this text gives an equal recipe.

        Fields that are None are left out, which means None again: no such field has another default.
        """
        return toml_writer.dumps(self.model_dump(by_alias=True, exclude_none=True))

    def batch_size_at(self, step: int) -> int:
        """Sequences in a step: the schedule's value, rounded to the nearest whole number of micro-batches."""
        unit = self.training.micro_batch_size or 1
        return round(self.data.batch_size.at(step) / unit) * unit

    def largest_batch_size(self) -> int:
        """Sequences in the largest batch of the run."""
        return max(self.batch_size_at(step) for step in range(self.training.steps))

    def total_tokens(self) -> int:
        """Tokens that the whole run predicts: the sum of its batches times the sequence length."""
        return self.data.sequence_length * sum(self.batch_size_at(step) for step in range(self.training.steps))

    def notes(self) -> list[str]:
        """Sentences that the author of this recipe should read; see `tessera.recipe.notes`."""
        found = list(notes.model_notes(self.model))
        if self.numerics.precision == "fp8":
            found += notes.tile_notes(self.model)
        found += notes.stability_notes(self.training.steps, self.stability)
        return found + list(notes.schedule_notes(self.training.steps, self._schedules()))

    def _schedules(self) -> dict[str, Schedule]:
        return {
            "optimizer.learning_rate": self.optimizer.learning_rate,
            "data.batch_size": self.data.batch_size,
            "training.bias_update_speed": self.training.bias_update_speed,
            "training.mtp_loss_weight": self.training.mtp_loss_weight,
        }

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._batch_problems()
        length, depth = self.data.sequence_length, self.model.num_nextn_predict_layers
        if length > self.model.max_position_embeddings:
            yield (
                "data.sequence_length",
                f"{length} must not exceed model.max_position_embeddings = {self.model.max_position_embeddings}",
            )
        if length <= depth:
            yield (
                "data.sequence_length",
                f"{length} must exceed model.num_nextn_predict_layers = {depth}, or MTP has nothing to predict",
            )

    def _batch_problems(self) -> Iterator[tuple[str, str]]:
        micro = self.training.micro_batch_size
        for size in self.data.batch_size.ends():
            if size < 1 or size != int(size):
                yield "data.batch_size", f"{size:g} must be a whole number of sequences, at least 1"
                return
            if micro is not None and size % micro:
                yield (
                    "training.micro_batch_size",
                    f"{micro} must divide every data.batch_size, among them {size:g}",
                )
                return
