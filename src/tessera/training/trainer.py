"""The loop: from a recipe and batches to weights, one event at a time.

A step: cut the batch into micro-batches, add up their gradients in FP32, look whether everything is finite and no
spike (`stability`), clip, update the weights, then move the routing biases once by the counts of the whole batch
(DeepSeek-V3 report, section 2.1.2). What is seen on the way is written to the run's event file and handed to
`observer`; nothing here prints.

Everything that the next step depends on is in `save`; a run that is stopped and resumed gives the same bits as one
that is not. Wall-clock figures (tokens/s, MFU, elapsed seconds) are measurements and differ.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import native
from tessera.accounting import flops_per_token, mfu, parameters
from tessera.data import Batch, Dataset
from tessera.model import Transformer
from tessera.model.weights import read_weights, weights
from tessera.numerics import Policy, Recorder
from tessera.ops.chunked_loss import IGNORED
from tessera.ops.keep import Keep
from tessera.recipe import Recipe, UserError
from tessera.store import RunFolder
from tessera.store.checkpoint_path import EMA, OPTIMIZER, STATE, WEIGHTS
from tessera.store.files import Unwritable
from tessera.store.run_folder import State
from tessera.training import checkpoint, nonfinite
from tessera.training.arms import require_backward
from tessera.training.checkpoint import Parts
from tessera.training.checkpoint_writer import CheckpointWriter
from tessera.training.ema import Ema
from tessera.training.evidence import UnstableStep, keep_evidence
from tessera.training.interrupt import finish_on_signal
from tessera.training.journal import Journal, Observer
from tessera.training.loss import Losses, Share, training_loss
from tessera.training.optimizer import AdamW
from tessera.training.peak import measured_flops
from tessera.training.random_streams import restore_streams, seed_streams, stream_states
from tessera.training.stability import Finding, Stability, Stopped, stopped
from tessera.training.validation import Validation, held_out, validate
from tessera.training.way_back import way_back


class Trainer:
    """One run at one step. `step` counts finished steps, `position` consumed sequences, `tokens` predicted ones."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        dataset: Dataset,
        *,
        device: str = "cpu",
        arm: str = "fp8",
        milestones: Collection[int] = (),
        observer: Observer = lambda event: None,
    ) -> None:
        """A fresh run at step 0. `milestones` are steps whose checkpoints are written and never removed.

        Raises UserError for numerics that have a forward pass only.
        """
        require_backward(recipe.numerics)
        self.recipe, self.run_folder, self.dataset = recipe, run, dataset
        self.device, self.arm, self.milestones = torch.device(device), arm, frozenset(milestones)
        self.observer = observer
        self.recorder = Recorder()
        seed_streams(recipe.training.seed)
        policy = Policy(**recipe.numerics.model_dump())
        self.model = Transformer(
            recipe.model,
            policy,
            recorder=self.recorder,
            keep=Keep(**recipe.memory.model_dump()),
            seed=recipe.training.seed,
            device=self.device,
        )
        self.optimizer = AdamW(dict(self.model.named_parameters()), recipe.optimizer)
        decay = recipe.training.ema_decay
        self.ema = None if decay is None else Ema(self.model, decay)
        self.stability = Stability(recipe.stability)
        self.step = self.position = self.tokens = 0
        self.seconds = 0.0  # of training, over all sittings
        self._flops = flops_per_token(recipe.model, recipe.data.sequence_length).training
        self._offset: int | None = 0
        self._resumed_at = -1  # what was just read need not be written again
        batches = held_out(dataset, recipe, recipe.training.validation_batches)
        self._held_out = [batch.to(self.device) for batch in batches]

    # Where a run starts

    @classmethod
    def resume(cls, run: RunFolder, dataset: Dataset, path: Path, **options: Any) -> "Trainer":
        """The run of `run`, at the checkpoint `path`; `options` as in the constructor."""
        trainer = cls(run.recipe(), run, dataset, **options)
        try:
            state = trainer._restore(path)
        except UserError as error:
            raise UserError(f"{error}\n{way_back(run, path)}") from None
        if state["data"] != dataset.facts["digest"]:
            raise UserError(
                f"{path}: trained on other text than data.source holds now (a newer Python brings another standard "
                "library); put the text back, or begin a new stage with --from"
            )
        return trainer

    def _restore(self, path: Path) -> dict[str, Any]:
        """Take everything from a checkpoint; returns its state. Raises UserError naming what is damaged."""
        parts = self._tensors()
        state = checkpoint.read_state(path, parts.keys())
        names = ("step", "position", "tokens", "event_offset", "optimizer_steps")
        self.step, self.position, self.tokens, self._offset, self.optimizer.steps = (
            checkpoint.number(path, state, name) for name in names
        )
        self.seconds = checkpoint.seconds(path, state)
        if not isinstance(state.get("data"), str):
            raise UserError(f"{path / STATE}: data must be the digest of the text; the checkpoint is damaged")
        checkpoint.read_parts(path, parts)
        try:
            restore_streams(state.get("random"), self.device)
            self.stability.restore(state.get("stability"))
        except UserError as error:
            raise UserError(f"{path / STATE}: {error}") from None
        self._resumed_at = self.step
        return state

    def _tensors(self) -> Parts:
        """The tensors that a checkpoint holds; waits for the averages, which the next step changes."""
        averages = {EMA: self.ema.tensors()} if self.ema else {}
        return {WEIGHTS: weights(self.model), OPTIMIZER: self.optimizer.tensors(), **averages}

    def start_from(self, path: Path) -> None:
        """Take weights and routing biases from a checkpoint, and nothing else: a new stage begins at step 0."""
        checkpoint.read_state(path)
        read_weights(path, self.model)
        if self.ema:
            self.ema.restart()

    @torch.no_grad()
    def perturb(self, seed: int) -> None:
        """Multiply every master by 1 +- 2^-20, signs drawn from `seed`: a control run (docs/numerics.md)."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device)
            parameter.mul_(1 + (2.0 * signs - 1) * 2.0**-20)
        if self.ema:
            self.ema.restart()

    # The run

    def run(self, announce: Callable[[], None] | None = None) -> State:
        """Train to the recipe's last step; returns "finished" or "interrupted" (Ctrl-C, SIGTERM; checkpoint kept).

        `announce` is called, in a thread of its own, as soon as such a signal arrives. Raises Stopped before the
        optimizer of a step at which the recipe's [stability] ends the run (NonFinite, of these, where a step is not
        finite), and UserError where the disk refuses; the run's state is then "failed".
        """
        native.keep_freed_memory()
        run, section = self.run_folder, self.recipe.checkpoint
        go_on = section.on_failed_write == "go_on"
        self._journal = Journal(run, self.recipe.name, self._offset, self.observer, go_on=go_on)
        self._checkpoints = CheckpointWriter(
            run, section, self.dataset.tokenizer.to_json(), milestones=self.milestones, saved=self._resumed_at
        )
        try:
            run.settle()  # the events are locked by now, so that nobody else writes here
            run.set_state("running", self.step, arm=self.arm)
            if self.recipe.training.tensorboard:
                self._journal.draw_curves(run.path, self.step)
            self._announce()
            with finish_on_signal(announce) as wish:
                while self.step < self.recipe.training.steps and not wish.stop:
                    self._step()
                    self._look_up()
                # Still inside: a second SIGTERM must not end the process in the middle of its checkpoint.
                state: State = "finished" if self.step >= self.recipe.training.steps else "interrupted"
                self._join_save()
                if self._checkpoints.saved != self.step:
                    with self._journal.strictly():  # without it there is nothing to go on with
                        self._save()
                        self._join_save()
                self._end(state)
        except BaseException as error:
            with suppress(Exception):  # a full disk: what is told is the first error, not one of its echoes
                self._fail(error)
            raise
        self._close(state)
        return state

    def _fail(self, error: BaseException) -> None:
        facts = {}
        try:
            if isinstance(error, Stopped):
                facts["stopped"] = error.reason  # going on would end here again
                if isinstance(error, nonfinite.NonFinite):
                    facts["nonfinite"] = error.where
                self._end(error.reason)
        finally:
            self._close("failed", **facts)

    def _close(self, state: State, **facts: Any) -> None:
        with ExitStack() as last_first:
            last_first.callback(self.run_folder.set_state, state, self.step, arm=self.arm, **facts)
            last_first.callback(self._journal.close, self.step)
            if self.ema:
                last_first.callback(self.ema.close)
            last_first.callback(self._checkpoints.close)

    def _end(self, reason: str) -> None:
        speed = self.tokens / max(self.seconds, 1e-9)
        self._emit("end", reason=reason, seconds=self.seconds, tokens_per_s=speed)

    def _step(self) -> None:
        started = time.perf_counter()
        t, step = self.recipe.training, self.step
        size = self.recipe.batch_size_at(step)
        batch = self.dataset.train.batch(self.position, size)
        if self._due(t.health_interval, step) or (step == t.steps - 1 and t.health_interval):
            self.recorder.measuring = True
        self.recorder.clear()
        share = Share(
            positions=max(int((batch.targets != IGNORED).sum()), 1),
            sequences=size,
            mtp_weight=t.mtp_loss_weight.at(step),
            balance_weight=t.balance_loss_weight,
        )
        self.optimizer.zero_gradients()
        losses = self._accumulate(batch, share)
        norm = self.optimizer.gradient_norm()
        total = sum((one.total.detach() for one in losses), torch.zeros(()))
        finite = bool(torch.isfinite(norm) & torch.isfinite(total)) and not self.recorder.first_nonfinite()
        rate = self.recipe.optimizer.learning_rate.at(step) * self.stability.rate_scale
        finding = self.stability.judge(float(sum(one.lm for one in losses)), float(norm), finite=finite)
        if finding:
            self._tell(finding, batch, share, losses, rate)
        counts = [torch.stack(layer).sum(dim=0) for layer in zip(*(one.counts for one in losses), strict=True)]
        speed = t.bias_update_speed.at(step)
        if finding is None or finding.applied:
            self._update(rate, float(norm), counts, speed)
        else:
            self.optimizer.zero_gradients()

        self.step += 1
        self.position += size
        self.tokens += size * self.recipe.data.sequence_length
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self._record(step, size, losses, float(total), float(norm), rate, speed, share, elapsed, counts)

    def _update(self, rate: float, norm: float, counts: list[Tensor], speed: float) -> None:
        """Everything that a step changes: weights and moments, their average, the routing biases."""
        if self.ema:
            self.ema.join()
        self.optimizer.step(rate, min(1.0, self.recipe.optimizer.gradient_clip / (norm + 1e-12)))
        if self.ema:
            self.ema.update()
        for (_, router), count in zip(self.model.routers(), counts, strict=True):
            router.update_bias(count, speed)

    def _tell(self, finding: Finding, batch: Batch, share: Share, losses: list[Losses], rate: float) -> None:
        """Keep the evidence of a step that is no calm one, say what is done; raises Stopped where that is to stop."""
        where = None
        if finding.kind == "nonfinite":
            with self.recorder.undisturbed():
                forward = partial(self._accumulate, batch, share, backward=False)
                where = nonfinite.find(self.model, self.recorder, forward)
        parts, masked = list(self._parts(batch)), not self.recipe.data.cross_document_attention
        seen = UnstableStep(self.step, self.position, batch, parts, masked, share, losses, rate, where)
        kept = keep_evidence(self.run_folder, finding, seen, self.model, self.recorder, self.dataset.tokenizer)
        stops = finding.decision == "stopped"
        with suppress(Exception) if stops else nullcontext():  # what is told is why the run stops, not a full disk
            self._emit("unstable", **finding.facts(where), **kept)
        if stops and where is not None and finding.rule == "stop":
            raise nonfinite.NonFinite(self.step, where)
        if stops:
            raise stopped(self.step, finding, where)

    def _accumulate(self, batch: Batch, share: Share, backward: bool = True) -> list[Losses]:
        """Forward and backward of every micro-batch; gradients add up in the parameters."""
        masked = not self.recipe.data.cross_document_attention
        losses = []
        for part in self._parts(batch):
            one = training_loss(self.model, part, part.document_ids if masked else None, share)
            if backward:
                one.total.backward()
            losses.append(one)
        return losses

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """The micro-batches, each brought to the device when it is asked for."""
        return (part.to(self.device) for part in batch.split(self.recipe.training.micro_batch_size))

    def _record(
        self,
        step: int,
        size: int,
        losses: list[Losses],
        total: float,
        norm: float,
        rate: float,
        speed: float,
        share: Share,
        elapsed: float,
        counts: list[Tensor],
    ) -> None:
        t, last = self.recipe.training, step == self.recipe.training.steps - 1
        per_second = size * self.recipe.data.sequence_length / elapsed
        if self._due(t.log_interval, step) or last:
            depths = torch.stack([one.mtp for one in losses]).sum(dim=0)
            self._emit(
                "step",
                step,
                loss=total,
                lm_loss=float(sum(one.lm for one in losses)),
                mtp_loss=float(depths.mean()) if depths.numel() else None,
                balance_loss=float(sum(one.balance for one in losses)),
                gradient_norm=norm,
                learning_rate=rate,
                tokens=self.tokens,
                tokens_per_s=per_second,
                mfu=mfu(self._flops, per_second, self._peak),
                batch_size=size,
                bias_update_speed=speed,
                mtp_loss_weight=share.mtp_weight,
            )
        if counts and (self._due(t.load_interval, step) or last):
            biases = [router.e_score_correction_bias for _, router in self.model.routers()]
            self._emit(
                "load",
                step,
                layers=[name for name, _ in self.model.routers()],
                counts=[count.tolist() for count in counts],
                bias_min=[float(b.min()) for b in biases],
                bias_max=[float(b.max()) for b in biases],
            )
        if self.recorder.measuring:
            self._emit("health", step, tensors=dict(self.recorder.tensors))
            self.recorder.measuring = False

    # Between steps

    def _look_up(self) -> None:
        """Validation and checkpoints that are due after the step just made."""
        t, interval = self.recipe.training, self.recipe.checkpoint.interval
        last = self.step == t.steps
        self._look_after_save()
        if t.validation_interval and (self.step % t.validation_interval == 0 or last):
            self._emit("validation", **self.validate().facts(), **self._validate_ema())
        due = interval and self.step % interval == 0
        if (due or self.step in self.milestones) and not last:
            self._save()

    def validate(self) -> Validation:
        """Score the recipe's held-out batches with the weights as they are."""
        masked, micro = not self.recipe.data.cross_document_attention, self.recipe.training.micro_batch_size
        parts = [part for batch in self._held_out for part in batch.split(micro)]
        return validate(self.model, parts, self.dataset.token_bytes, masked=masked)

    def _validate_ema(self) -> dict[str, Any]:
        if self.ema is None:
            return {}
        with self.ema.in_place():
            found = self.validate()
        return {"ema_loss": found.loss, "ema_bits_per_byte": found.bits_per_byte}

    def _save(self) -> None:
        self._join_save()
        path = self.run_folder.checkpoint_path(self.step)
        # Before the offset is taken: a run that goes on from this checkpoint keeps the event of it.
        if not self._emit("checkpoint", path=str(path.relative_to(self.run_folder.path))):
            return  # the events would not lead to it
        try:
            self._checkpoints.save(self.step, self._tensors(), self._state())
            self.run_folder.set_state("running", self.step, arm=self.arm)
        except Unwritable as error:
            self._journal.refused(error, self.step)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors; `_restore` takes it back."""
        return {
            "optimizer_steps": self.optimizer.steps,
            "position": self.position,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "event_offset": self._journal.offset,
            "data": self.dataset.facts["digest"],
            "random": stream_states(self.device),
            "stability": self.stability.facts(),
        }

    def _join_save(self) -> None:
        """Wait for the save under way."""
        try:
            self._checkpoints.join()
        except Unwritable as error:
            self._journal.refused(error, self.step)

    def _look_after_save(self) -> None:
        """Hear at the next step, not at the next save, that one has failed."""
        try:
            self._checkpoints.check()
        except Unwritable as error:
            self._journal.refused(error, self.step)

    def _announce(self) -> None:
        t = self.recipe.training
        counts = parameters(self.recipe.model)
        self._peak = measured_flops(self.model.policy.activation_dtype, self.device)
        self._emit(
            "start",
            arm=self.arm,
            precision=self.recipe.numerics.precision,
            parameters=counts.total + counts.mtp_total,
            active_parameters=counts.active + counts.mtp_active,
            tokens_per_step=self.recipe.batch_size_at(self.step) * self.recipe.data.sequence_length,
            steps=t.steps,
            notes=self.recipe.notes(),
            resumed=self.step > 0,
            threads=torch.get_num_threads(),
            device=str(self.device),
            peak_flops=self._peak,
        )

    def _due(self, interval: int, step: int) -> bool:
        return interval > 0 and step % interval == 0

    def _emit(self, kind: str, step: int | None = None, **fields: Any) -> bool:
        return self._journal.emit(kind, self.step if step is None else step, **fields)
