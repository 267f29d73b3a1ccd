"""The same-weights figures of a comparison, measured once and kept in evaluation/same_weights.json.

What is asked is a list of rows; the file holds those that are measured, and is written after each piece, so that an
interrupted evaluation goes on where it was and a further ablation measures itself alone. The first piece are the
criteria of the verdict (`points` over the run, the gradient at its end) and the bigram's bits per byte.

Rows are measured on the final weights. Some must fail, or the verdict is worth nothing (docs/numerics.md); one is shown
for reference; of the others it is told whether the criteria can tell them from what they vary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tessera.data import Dataset, WittenBellBigram
from tessera.recipe import Recipe
from tessera.store import RunFolder, write_json
from tessera.store.json_text import check_schema, read_object
from tessera.training import verdict
from tessera.training.same_weights import NUM_BATCHES, SameWeights, Yardstick, gradient_error, milestones
from tessera.training.validation import held_out

SCHEMA = 1
# Measured on the BF16 arm's final weights, not trained.
ABLATIONS = (
    "float32-scales",
    "deepseek-v3-scales",
    "per-row",
    "per-tensor",
    "e5m2-gradients",
    "block-gradients",
    "bf16-attention-output",
    "bf16-swiglu-inputs",
    "toward-zero",
    "fp8, outlier",
    "per-tensor, outlier",
)
ACCUMULATION = "hopper-unpromoted"  # slow on a CPU: on request only
MUST_FAIL = ("toward-zero", "per-tensor, outlier")
REFERENCE = ("fp8, outlier",)
ACCUMULATION_TOKENS = 256

OUTLIER_SUFFIX = ", outlier"  # a row with one channel scaled by 1e5
_CRITERIA = ("same_weights_gradient_error", "same_weights_gradient_bias", "bigram_bits_per_byte")
Emit = Callable[[dict[str, Any]], None]


def arm_of(row: str) -> str:
    """The arm that a row measures."""
    return row.removesuffix(OUTLIER_SUFFIX)


def read_figures(path: Path) -> dict[str, Any]:
    """What an earlier sitting measured, {} where there is nothing; raises UserError for a damaged or newer file.

    NaN is written as null, which would read as "not measured, no bar": a piece with one is left out, to be measured
    again.
    """
    if not path.is_file():
        return {}
    figures = read_object(path)
    check_schema(path, figures.get("schema"), SCHEMA)
    rows = {name: row for name, row in figures.get("ablations", {}).items() if row["loss_error"] is not None}
    finite = all(figures.get(name) is not None for name in _CRITERIA)
    finite = finite and all(point["loss_error"] is not None for point in figures["points"])
    return figures | {"ablations": rows} if finite else {}


def missing(figures: dict[str, Any], rows: tuple[str, ...]) -> list[str]:
    """The rows that are still to be measured; `figures` as `read_figures` gives them."""
    return [row for row in rows if row not in figures.get("ablations", {})]


class Evaluation:
    """Measures what is missing; `path` is the file that keeps it, `bf16` the run whose checkpoints hold the weights."""

    def __init__(self, path: Path, recipe: Recipe, dataset: Dataset, bf16: RunFolder, emit: Emit) -> None:
        self.path, self.recipe, self.dataset, self.bf16, self.emit = path, recipe, dataset, bf16, emit
        self.judge = SameWeights(recipe, held_out(dataset, recipe, NUM_BATCHES))
        self.steps = milestones(recipe.training.steps)
        self.figures = read_figures(path)
        self._done = self._total = 0
        # Of the weights that are loaded: FP32's answers are the same for every row, and cost as much as a row.
        self._weights: tuple[int, bool] | None = None
        self._yardstick: Yardstick | None = None
        self._reference: dict[str, Tensor] | None = None

    def run(self, rows: tuple[str, ...]) -> dict[str, Any]:
        """Measure the criteria and the rows; returns all figures of the file."""
        wanted = missing(self.figures, rows)
        batches = len(self.judge.batches)
        self._total = len(wanted) * batches + (0 if self.figures else len(self.steps) * batches * 2)
        if not self.figures:
            self._keep(self._criteria() | {"ablations": {}})
        for row in sorted(wanted, key=lambda row: row.endswith(OUTLIER_SUFFIX)):  # the same weights one after another
            measured = self._accumulation() if row == ACCUMULATION else self._row(row)
            self._keep(self.figures | {"ablations": self.figures["ablations"] | {row: measured}})
        return self.figures

    def _keep(self, figures: dict[str, Any]) -> None:
        self.figures = {"schema": SCHEMA} | figures
        write_json(self.path, self.figures)

    def _progress(self) -> None:
        self._done += 1
        self.emit({"kind": "progress", "done": self._done, "total": self._total})

    def _load(self, step: int, *, outlier: bool = False) -> None:
        if self._weights != (step, outlier):
            self._yardstick = self._reference = None  # a gradient is as large as the weights: let go of it first
            self.judge.load(self.bf16.checkpoint_path(step), outlier=outlier)
            self._weights = step, outlier

    def _exact(self) -> Yardstick:
        """The FP32 arm's answers on the weights that are loaded, measured once."""
        if self._yardstick is None:
            self._yardstick = self.judge.yardstick()
        return self._yardstick

    def _exact_gradient(self) -> dict[str, Tensor]:
        """The FP32 arm's gradient on the weights that are loaded, measured once."""
        if self._reference is None:
            self._reference = self.judge.gradient("fp32", self._exact().routing)
        return self._reference

    def _criteria(self) -> dict[str, Any]:
        judge, points = self.judge, []
        for step in self.steps:
            self._load(step)
            exact = self._exact()
            fp8 = judge.loss_error("fp8", exact, progress=self._progress)
            bf16 = judge.loss_error("bf16", exact, progress=self._progress)
            points.append(
                {
                    "step": step,
                    "loss_error": fp8.free,
                    "loss_error_replayed": fp8.replayed,
                    "rerouted_tokens": fp8.rerouted,
                    "bf16_loss_error": bf16.free,
                    "bf16_rerouted_tokens": bf16.rerouted,
                }
            )
        reference = self._exact_gradient()
        replayed = gradient_error(judge.gradient("fp8", exact.routing), reference)
        free = gradient_error(judge.gradient("fp8", None), reference)
        bf16_gradient = gradient_error(judge.gradient("bf16", exact.routing), reference)
        return {
            "held_out_batches": len(judge.batches),
            "held_out_tokens": sum(batch.tokens.numel() for batch in judge.batches),
            "points": points,
            "same_weights_gradient_error": replayed.error,
            "same_weights_gradient_bias": replayed.bias,
            "worst_tensor": {"name": replayed.worst_name, "error": replayed.worst_error},
            "gradient_error_free_routing": free.error,
            "bf16_gradient_error": bf16_gradient.error,
            "bigram_bits_per_byte": bigram_bits_per_byte(self.dataset, self.recipe),
        }

    def _row(self, row: str) -> dict[str, Any]:
        """The criteria of the verdict at one point; with an outlier, and where an arm has no backward, loss only."""
        arm, outlier = arm_of(row), row.endswith(OUTLIER_SUFFIX)
        self._load(self.steps[-1], outlier=outlier)
        exact = self._exact()
        loss = self.judge.loss_error(arm, exact, progress=self._progress).free
        if outlier:
            return judged(row, loss, None, None, "one channel scaled by 1e5, loss only")
        gradient = gradient_error(self.judge.gradient(arm, exact.routing), self._exact_gradient())
        return judged(row, loss, gradient.error, gradient.bias, "final weights")

    def _accumulation(self) -> dict[str, Any]:
        """Unpromoted against promoted accumulation, both on row tiles: one batch of 256 tokens, loss only."""
        self._load(self.steps[-1])
        first = self.judge.batches[0]
        length = min(first.tokens.shape[1], ACCUMULATION_TOKENS)
        rows = max(1, ACCUMULATION_TOKENS // length)
        parts = (first.tokens, first.targets, first.document_ids)
        short = [type(first)(*(part[:rows, :length].contiguous() for part in parts))]
        exact = self.judge.yardstick("hopper-row", short)
        loss = self.judge.loss_error(ACCUMULATION, exact, short, progress=self._progress).free
        return judged(ACCUMULATION, loss, None, None, "against hopper-row, one batch of 256 tokens, loss only")


def judged(row: str, loss: float, gradient: float | None, bias: float | None, note: str) -> dict[str, Any]:
    """A row of figures with its verdict in words; None where it was not measured."""
    missed = verdict.failures(loss, gradient, bias)
    if row in REFERENCE:
        word, missed = "for reference", []
    elif row in MUST_FAIL:
        word = "failed, as it must" if missed else "not caught"
    else:
        word = "failed" if missed else "indistinguishable at this size"
    return {
        "loss_error": loss,
        "gradient_error": gradient,
        "gradient_bias": bias,
        "verdict": word,
        "note": "; ".join([note, *missed]),
    }


def uncaught(figures: dict[str, Any]) -> list[str]:
    """What the criteria let pass although they must not, in words: then a pass of theirs says nothing."""
    rows = figures["ablations"]
    return [
        f"the criteria do not catch {row} (loss error {rows[row]['loss_error']:.3%}), as they must: their pass "
        "says nothing"
        for row in MUST_FAIL
        if row in rows and rows[row]["verdict"] == "not caught"
    ]


def bigram_bits_per_byte(dataset: Dataset, recipe: Recipe) -> float:
    """Held-out bits per byte of a Witten-Bell bigram counted on exactly the sequences that the run consumes."""
    bigram = WittenBellBigram(recipe.model.vocab_size)
    position = 0
    for step in range(recipe.training.steps):
        size = recipe.batch_size_at(step)
        batch = dataset.train.batch(position, size)
        bigram.count(batch.tokens.numpy(), batch.targets.numpy())
        position += size
    batches = held_out(dataset, recipe, recipe.training.validation_batches)
    return bigram.bits_per_byte([(b.tokens.numpy(), b.targets.numpy()) for b in batches], dataset.token_bytes)
