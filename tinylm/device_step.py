"""An optimizer step on a device that nobody waits for.

A device that judges gradients itself (kernels/guarded.py) is asked for a step, and how it went is
read while it works on the next one. If nothing but a batch's arrays changes from step to step, the
whole step, forward to AdamW, is recorded once and replayed (kernels/recorded.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy

from tinylm import backend
from tinylm.data import Batch
from tinylm.kernels.recorded import NotRecorded


def device_step(trainer) -> DeviceStep | None:
    """What makes this trainer's steps, where a device is in use that can by itself. Says so where
    there is a device, but no graph of its steps."""
    if not hasattr(backend.kernels, "guarded_adamw"):
        return None
    stage, optimizer = trainer.stage, trainer.optimizer
    able = optimizer.can_be_guarded and not stage.cautious
    made = DeviceStep(trainer) if able else None
    if not made or made.recorded is None:
        name = trainer.config.optimizer
        trainer.progress.say(f"{stage.name} with {name}: kernel by kernel, not as a CUDA graph")
    return made


class DeviceStep:
    """Makes the steps of a train.Trainer."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.recorded = backend.kernels.recorded(self.whole) if trainer.stage.recordable else None

    def ask(self, batches: list[Batch], n: int, lr: float) -> Callable[[], tuple]:
        """Ask for forward, backward and update; what is returned waits, and gives the summed loss,
        the norm of the gradient, and how many updates were made so far."""
        optimizer, rate = self.trainer.optimizer, numpy.array([lr], "float32")
        if not any(batch.learns() for batch in batches):
            return lambda: (0.0, 0.0, optimizer.steps)
        if self.recorded is not None:
            width = self.trainer.config.block_size
            inputs = [x for batch in batches for x in of_one_shape(batch, width, n)]
            try:
                return self.recorded(rate, *inputs)
            except NotRecorded as error:
                self.recorded = None
                optimizer.zero_grad()  # what was begun
                self.trainer.progress.say(f"kernel by kernel, as no graph can be made: {error}")
        told = self.update(self.trainer.backward(batches, n), backend.asarray(rate))
        return backend.kernels.later(told)

    def whole(self, rate, *inputs):
        """The step, of arrays on the device: the learning rate, and four of each batch."""
        total = 0.0
        for tokens, targets, start, weights in zip(*4 * [iter(inputs)]):
            loss = self.trainer.stage.loss(Batch(tokens, targets, start))
            total = total + loss.data.sum(dtype="float64")
            loss.backward(weights)
        return self.update(total, rate)

    def update(self, loss, rate):
        """AdamW, if the device finds nothing against it."""
        optimizer, trainer = self.trainer.optimizer, self.trainer
        told = optimizer.guarded_step(loss, rate, trainer.config.clip, trainer.guard)
        optimizer.zero_grad()
        return told


def of_one_shape(batch: Batch, width: int, n: int) -> list[numpy.ndarray]:
    """Tokens, targets, start, and what each loss is weighted by, 1 / n: (B, width) each.

    What is added on the right is a document of its own, from which nothing is learned.
    """
    B, T = batch.tokens.shape
    start = numpy.zeros((B, T)) if batch.start is None else batch.start
    with_padding = ((batch.tokens, 0), (batch.targets, -1), (start, T))
    found = [
        numpy.pad(x, ((0, 0), (0, width - T)), constant_values=padding).astype("int32")
        for x, padding in with_padding
    ]
    return [*found, numpy.full((B, width), 1 / n, "float32")]
