"""[checkpoint]: how often a run is saved, what is kept, and what a disk that refuses means for it."""

from typing import Literal

from pydantic import Field

from tessera.recipe.section import Section


class CheckpointSection(Section):
    """When checkpoints are written, which of them stay, and what happens where one cannot be written."""

    interval: int = Field(500, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_latest: int = Field(0, ge=0, description="Latest checkpoints that are kept; 0: all.")
    keep_every: int = Field(
        0, ge=0, description="Checkpoints at multiples of this step are never removed; 0: none is spared for its step."
    )
    asynchronous: bool = Field(
        True, description="Write a checkpoint beside the training steps, from a copy in CPU memory; same results."
    )
    on_failed_write: Literal["stop", "go_on"] = Field(
        "stop",
        description="What a disk that refuses a checkpoint or an event does to the run: end it, or tell of it and go "
        "on; earlier checkpoints stay, and the last one of a run must be written in any case.",
    )
