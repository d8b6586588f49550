"""Are the kernels right on this machine?  `tinylm selfcheck` prints what this module finds.

Two comparisons for every kernel, over the case list that the tests walk too: the reference's
gradients against finite differences, and the backend against the float64 reference. It prints
nothing and reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from tinylm.kernels import cases
from tinylm.kernels.cases import CASES, GRADIENT_TOLERANCE, OPS, TOLERANCE


@dataclass(frozen=True)
class Row:
    """The worst over all cases of one kernel."""

    kernel: str
    n_cases: int
    gradient_error: float | None  # relative; None where a kernel has no gradient
    parity_error: dict[str, float]  # by dtype: ‖out − ref‖ / ‖ref‖
    ok: bool


def selfcheck(kernels: ModuleType) -> list[Row]:
    """Check every kernel of a backend; takes a few seconds."""
    if hasattr(kernels, "xp"):
        kernels = FromNumPy(kernels)
    with np.errstate(all="ignore"):  # the cases overflow on purpose
        return [check(kernels, op) for op in OPS]


def check(kernels: ModuleType, op: str) -> Row:
    mine = [case for case in CASES if case.op == op]
    smooth = [cases.gradient_error(case) for case in mine if case.smooth and OPS[op].inputs]
    gradient = max(smooth, default=None)
    parity = max(cases.parity_error(kernels, case, "float32") / case.slack for case in mine)
    ok = parity <= TOLERANCE["float32"] and (gradient or 0.0) <= GRADIENT_TOLERANCE
    return Row(op, len(mine), gradient, {"float32": parity}, ok)


class FromNumPy:
    """A device's kernels for callers with NumPy arrays, which travel there and back."""

    def __init__(self, kernels):
        self.kernels, self.xp = kernels, kernels.xp

    def __getattr__(self, name: str):
        kernel = getattr(self.kernels, name)

        def call(**arguments):
            # an array that is passed twice arrives as one: a gradient may be written over it
            moved = {id(v): self.to_device(v) for v in arguments.values()}
            there = {k: moved[id(v)] for k, v in arguments.items()}
            result = self.from_device(kernel(**there))
            for k in set(OPS[name].returns) & set(arguments) if name in OPS else ():
                self.bring_back(there[k], arguments[k])
            self.kernels.settle()
            return result

        return call

    def to_device(self, x):
        if isinstance(x, list):
            return [self.to_device(part) for part in x]
        return self.xp.asarray(x) if isinstance(x, np.ndarray) else x

    def bring_back(self, there, here) -> None:
        """What a kernel has written to."""
        if isinstance(here, list):
            for pair in zip(there, here):
                self.bring_back(*pair)
        else:
            here[...] = there.get()

    def from_device(self, x):
        if isinstance(x, tuple):
            return tuple(self.from_device(part) for part in x)
        return x.get() if isinstance(x, self.xp.ndarray) else x
