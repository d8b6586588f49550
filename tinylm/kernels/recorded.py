"""A CUDA graph: what a whole step asks of the device, recorded once and asked again in one call.

A step asks for a thousand kernels, and asking takes the host 5 to 10 µs each. A graph is the list
of them with all their arguments, sizes and addresses, and replaying it does the same to the same
memory. So whatever changes from step to step comes in arrays that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable


class NotRecorded(Exception):
    """The device refused to record; nothing was computed."""


class Recorded:
    """A function of arrays on the device, to be called with arrays of the host, always of the same
    shapes and dtypes. It runs as it is the first time, which compiles what it launches; is recorded
    the second time; and is replayed from then on.

    The function must not wait for the device, nor bring anything to it, and what it does on the
    host must be right for every call. It returns what Kernels.later reads.
    """

    def __init__(self, kernels, function: Callable):
        self.kernels, self.device, self.function = kernels, kernels.device, function
        self.memory = self.device.memory()  # the graph's own: the addresses in it must stay valid
        self.inputs, self.graph, self.told = None, None, None

    def __call__(self, *inputs) -> Callable[[], tuple]:
        given = [self.kernels.xp.asarray(x) for x in inputs]
        with self.device.apart(self.memory):
            if self.inputs is None:
                self.inputs = given
                return self.kernels.later(self.function(*given))
            for at, x in zip(self.inputs, given, strict=True):
                at[...] = x
            if self.graph is None:
                self.record()
            self.device.replay(self.graph)
            return self.kernels.later(self.told)

    def __del__(self):
        self.inputs = self.graph = self.told = None
        self.device.give_back(self.memory)

    def record(self) -> None:
        """Raises NotRecorded."""
        try:
            self.graph, self.told = self.device.record(lambda: self.function(*self.inputs))
        except Exception as error:
            raise NotRecorded(f"{type(error).__name__}: {error}") from error
