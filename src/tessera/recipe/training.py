"""[training]: how long a run is, what its loss adds up, and how often it looks up from the work."""

from pydantic import Field

from tessera.recipe.schedule import Schedule
from tessera.recipe.section import Section


class TrainingSection(Section):
    """Steps, loss weights, and the intervals of validation and measurements."""

    steps: int = Field(ge=1, description="Optimizer steps of the run.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Sequences in one forward and backward pass; left out: the whole batch."
    )
    seed: int = Field(0, ge=0, description="Seed of the initial weights.")
    balance_loss_weight: float = Field(
        1e-4, ge=0, description="Weight of the sequence-wise balance loss (alpha in the report)."
    )
    bias_update_speed: Schedule = Field(
        Schedule(0.001), description="Change of an expert's routing bias in a step (gamma in the report)."
    )
    mtp_loss_weight: Schedule = Field(
        Schedule(0.3), description="Weight of the multi-token prediction loss (lambda in the report)."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of the moving average of the parameters, kept in CPU memory; left out: no average.",
    )
    validation_interval: int = Field(100, ge=0, description="Steps between validations; 0: none.")
    validation_batches: int = Field(8, ge=1, description="Held-out batches in one validation.")
    health_interval: int = Field(
        50, ge=0, description="Steps between measurements of what FP8 did to each tensor; 0: none."
    )
    load_interval: int = Field(10, ge=0, description="Steps between records of the experts' loads; 0: none.")
    log_interval: int = Field(1, ge=1, description="Steps between recorded and printed steps.")
    time_limit_minutes: float | None = Field(
        None, gt=0, description="Time you have: a run estimated to take longer says so. It never cuts steps."
    )
    tensorboard: bool = Field(False, description="Write TensorBoard's files too.")
