"""Whether a judge is being outwitted: its scores rise, and what they stand for falls."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy


@dataclass
class Watch:
    """Compares judge and gold by their means over windows of steps.

    Outwitted is, once and for all, a judge that thinks more of the model than in the window that
    was best by gold while gold thinks less, by 2 + √ln n standard errors of that difference, in two
    windows one after the other (the turn of the curves of arXiv 2210.10760). Of n windows of mere
    noise, the best lies √ln n of these errors above the mean.
    """

    window: int = 20
    seen: list[tuple[float, float]] = field(default_factory=list)  # (judge, gold) of each step
    best: tuple[float, float, float] | None = None  # judge, gold and its variance
    windows: int = 0  # seen so far, n
    worse: int = 0  # windows since then that were worse
    outwitted: bool = False

    def see(self, judged: float, gold: float) -> bool:
        """One step's means; true where the judge has just been found outwitted."""
        self.seen.append((judged, gold))
        if len(self.seen) < self.window:
            return False
        judged, gold = numpy.mean(self.seen, 0).tolist()
        variance = float(numpy.var(self.seen, 0)[1]) / self.window
        self.seen, self.windows = [], self.windows + 1
        if not self.best or gold > self.best[1]:
            self.best = (judged, gold, variance)
        error = (variance + self.best[2]) ** 0.5
        errors = 2 + math.log(self.windows) ** 0.5
        worse = judged > self.best[0] and self.best[1] - gold > errors * error
        self.worse = self.worse + 1 if worse else 0
        found = self.worse == 2 and not self.outwitted
        self.outwitted |= found
        return found
