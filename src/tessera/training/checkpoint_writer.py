"""Checkpoints written beside the training steps.

At a step boundary the tensors are copied into buffers in CPU memory, which are kept from one save to the next; then
training goes on, and one worker thread writes the copy, brings it to the disk, hashes it, gives it its name and
removes what the recipe no longer keeps. One save is under way at a time: the next one, and the end of the run, wait
for it. What is written is the same as without the worker.

The worker's error is raised in the trainer's thread at the next `check` or `join`. It is an `Unwritable` where a disk
refused, and otherwise a UserError that says what became of the worker.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.recipe import UserError
from tessera.recipe.checkpoint import CheckpointSection
from tessera.store import RunFolder
from tessera.training import checkpoint
from tessera.training.checkpoint import Parts


class CheckpointWriter:
    """Owns the worker and the buffers of one run; `saved` is the step of its last complete checkpoint, or -1."""

    def __init__(
        self,
        run: RunFolder,
        section: CheckpointSection,
        tokenizer: str,
        *,
        milestones: Collection[int] = (),
        saved: int = -1,
    ) -> None:
        """`tokenizer` is the text of tokenizer.json, `milestones` are steps whose checkpoints are never removed.

        Where torch.distributed is initialised all ranks make one, and a process group of the saves' own with it:
        messages of the worker must not mix with those of the training steps.
        """
        self.run, self.section, self.tokenizer = run, section, tokenizer
        self.milestones, self.saved = frozenset(milestones), saved
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if section.asynchronous else None
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._running: Future[None] | None = None
        self._step = saved  # of the save under way

    def save(self, step: int, parts: Parts, state: Mapping[str, Any]) -> None:
        """Save the tensors of `parts` as they are now, and `state`; raises what the save before it raised.

        They may change as soon as this returns.
        """
        self.join()
        self._step = step
        if self._worker is None:
            self._finish(self._write, parts, state)
        else:
            self._running = self._worker.submit(self._write, self._staged(parts), dict(state))

    def check(self) -> None:
        """Raise what the save under way raised, if it has ended; does not wait."""
        if self._running is not None and self._running.done():
            self.join()

    def join(self) -> None:
        """Wait for the save under way; raises what it raised."""
        if self._running is not None:
            running = self._running
            running.exception()  # a Ctrl-C here leaves it under way
            self._running = None
            self._finish(running.result)

    def close(self) -> None:
        """Wait for the save under way and end the worker."""
        try:
            self.join()
        finally:
            if self._worker:
                self._worker.shutdown()

    def _finish(self, write: Any, *arguments: Any) -> None:
        try:
            write(*arguments)
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a worker may die of anything, and the run must say more than its last words
            raise UserError(
                f"{self.run.checkpoint_path(self._step)}: was not written: {type(error).__name__}: {error}; earlier "
                "checkpoints are whole"
            ) from error

    @torch.no_grad()
    def _staged(self, parts: Parts) -> dict[str, dict[str, Tensor]]:
        staged: dict[str, dict[str, Tensor]] = {}
        devices = set()
        for part, tensors in parts.items():
            staged[part] = {}
            for name, tensor in tensors.items():
                buffer = self._buffers.get((part, name))
                if buffer is None:
                    # Pinned: only then a copy from a GPU does not wait for each tensor.
                    pinned = tensor.device.type == "cuda"
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
                    self._buffers[part, name] = buffer
                buffer.copy_(tensor, non_blocking=True)
                devices.add(tensor.device)
                staged[part][name] = buffer
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return staged

    def _write(self, parts: Parts, state: Mapping[str, Any]) -> None:
        checkpoint.save(self.run, self._step, parts, state, self.tokenizer, self._group)
        self.saved = self._step
        if self._group is None or dist.get_rank(self._group) == 0:
            checkpoint.prune(self.run, self._step, self.section, self.milestones)
