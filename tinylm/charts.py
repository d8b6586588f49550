"""Curves as paths: numbers become pixels here, templates/charts.html draws them as inline SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate

WIDTH, HEIGHT = 400, 230  # of a chart in its own pixels, about a phone's
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36  # margins of the plot in it

Points = list[tuple[float, float]]


@dataclass
class Axis:
    """Maps low to high onto the pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        scale = math.log10 if self.log else float
        low, high = scale(self.low), scale(self.high)
        share = (scale(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, label) of the round numbers within."""
        values = decades(self.low, self.high) if self.log else steps(self.low, self.high)
        return [(self.at(value), label(value)) for value in values]


def steps(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most so many and one; or the one value."""
    if low == high:
        return [float(f"{low:.6g}")]
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, the powers alone in a wide range, else equal steps."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = high > 200 * low
    values = [m * 10.0**k for k in powers for m in ((1,) if wide else (1, 2, 5))]
    values = [value for value in values if low <= value <= high]
    return values if len(values) > 2 else steps(low, high)


def label(value: float) -> str:
    """All digits of a round number: on an axis from 0.6930 to 0.6931, three would not do."""
    return f"{value:,.12g}".replace("e-0", "e-")


@dataclass
class Chart:
    """Lines, dots and marks over one pair of axes; `says` is what a pointer is told about them."""

    title: str
    across: str
    note: str = ""
    log: bool = False
    lines: list[tuple[str, Points]] = field(default_factory=list)  # (CSS class, points)
    dots: list[tuple[float, float, str]] = field(default_factory=list)  # (x, y, says)
    marks: list[tuple[float, str, str]] = field(default_factory=list)  # (x, CSS class, says)

    @property
    def points(self) -> Points:
        drawn = [point for _, points in self.lines for point in points]
        return drawn + [(x, y) for x, y, _ in self.dots]

    @property
    def x(self) -> Axis:
        values = [x for x, _ in self.points] + [x for x, _, _ in self.marks]
        return Axis(min(values), max(values), LEFT, WIDTH - RIGHT)

    @property
    def y(self) -> Axis:
        values = [y for _, y in self.points]
        return Axis(min(values), max(values), HEIGHT - BOTTOM, TOP, self.log and min(values) > 0)

    def paths(self) -> list[tuple[str, str]]:
        """(CSS class, the `d` of an SVG path) of each line."""
        x, y = self.x, self.y
        return [
            (style, "M" + "L".join(f"{x.at(a):g} {y.at(b):g}" for a, b in thinned(points)))
            for style, points in self.lines
            if points
        ]


def thinned(points: Points, most: int = 250) -> Points:
    return points[:: max(1, len(points) // most)]


def smooth(points: Points) -> Points:
    """Means over windows of about a twenty-fifth of the run, each centred on its point."""
    sums, n = [0.0, *accumulate(y for _, y in points)], len(points)
    smoothed = []
    for i, (x, _) in enumerate(points):
        w = min(n // 50, i, n - 1 - i)
        smoothed.append((x, (sums[i + w + 1] - sums[i - w]) / (2 * w + 1)))
    return smoothed
