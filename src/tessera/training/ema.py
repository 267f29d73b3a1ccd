"""The exponential moving average of the parameters, in CPU memory, kept up to date beside the training step.

    a <- a + (1 - d) (w - a)   after every step, in FP32

(DeepSeek-V3 report, section 3.2.3: an early estimate of what the weights will be once the learning rate has decayed.)
One worker thread does it while the next step computes its gradients: parameters do not change before the optimizer,
which `join` goes ahead of, so the worker reads whole weights and never half of an update. The averages start as the
weights that the run starts from, and are the same bits as those of the formula computed at once.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tessera.model.weights import weights


class Ema:
    """Averages of a model's parameters; float32, on the CPU. Owns them and the thread that moves them."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self._parameters = dict(model.named_parameters())
        self._averages = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._running: Future[None] | None = None

    def restart(self) -> None:
        """Begin again from the parameters as they are: a run that took its weights from elsewhere."""
        self.join()
        for name, parameter in self._parameters.items():
            self._averages[name].copy_(parameter.detach())

    def update(self) -> None:
        """Move the averages toward the parameters, in the worker; the parameters must not change before `join`."""
        self.join()
        self._running = self._worker.submit(self._move)

    def join(self) -> None:
        """Wait for the worker; raises what it raised."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def tensors(self) -> dict[str, Tensor]:
        """The averages under the parameters' names, with the model's buffers as they are (routing biases have none).

        Waits for the worker; the tensors are the averages' own memory, which the next `update` changes.
        """
        self.join()
        return weights(self.model) | self._averages

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model computes with the averages; afterwards with its parameters again, untouched."""
        self.join()
        kept = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._averages[name].to(parameter.device)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]

    def close(self) -> None:
        """Wait for the worker and end it."""
        try:
            self.join()
        finally:
            self._worker.shutdown()

    @torch.no_grad()
    def _move(self) -> None:
        averages = list(self._averages.values())
        now = [p.detach().to("cpu") for p in self._parameters.values()]
        torch._foreach_lerp_(averages, now, 1 - self.decay)
