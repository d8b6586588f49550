"""Draws the README's terminal: a recording (asciinema's .cast) as one animated SVG.

    pip install "asciinema<3" pyte
    asciinema rec --cols 92 --rows 32 --command bash quickstart.cast
    python docs/terminal.py quickstart.cast docs/images/quickstart.svg

Every screen lies below the one before it, and a window on the strip of them jumps from one to the
next. A line that several screens show is drawn once. From FROM to TO it is played FASTER.
"""

import json
import sys
from html import escape
from itertools import groupby
from pathlib import Path

import pyte

FASTER, FROM, TO = 20, "1 of 4", "Look at"  # times, between these words
APART, REST = 0.25, 6.0  # seconds between two pictures at least, and after the last
WIDE, HIGH, MARGIN = 8, 16, 14  # of a character, and around the screen, in pixels
BACK, FRONT = "#16181d", "#d7dae0"
COLOURS = {
    "red": "#f07178", "green": "#8fd27f", "brown": "#e8c66a", "blue": "#7aa7f0",
    "magenta": "#d291e4", "cyan": "#6fc7d1", "white": FRONT, "black": "#828a97",
}  # fmt: skip


def screens(cast: Path) -> tuple[list[tuple[float, list[str]]], int, int]:
    """(each picture: when it appears, in seconds, and its lines as SVG; columns; rows)."""
    head, *events = map(json.loads, cast.read_text().splitlines())
    screen = pyte.Screen(head["width"], head["height"])
    stream, made, time, last, seen = pyte.Stream(screen), [], 0.0, 0.0, ""
    for at, kind, text in events:
        if kind != "o":
            continue
        time += (at - last) / (FASTER if FROM in seen and TO not in seen else 1)
        last, seen = at, seen + text
        stream.feed(text.replace("\x1b[2m", "\x1b[90m"))  # pyte knows no dim
        shown = made.pop()[0] if made and time < made[-1][0] + APART else time
        made.append((shown, [line(screen.buffer[y], screen) for y in range(screen.lines)]))
    return made, screen.columns, screen.lines


def line(characters, screen: pyte.Screen) -> str:
    """Runs of one style, each as wide as its characters whatever the reader's font."""
    runs, x = [], 0
    cells = [characters[i] for i in range(screen.columns)]
    for (colour, bold), group in groupby(cells, lambda c: (c.fg, c.bold)):
        text = "".join(c.data for c in group)
        if text.strip():
            colour = colour.removeprefix("bright")
            fill = FRONT if colour == "default" else COLOURS.get(colour, f"#{colour}")
            style = f' fill="{fill}"' + (' font-weight="bold"' if bold else "")
            place = f'x="{x * WIDE}" textLength="{len(text) * WIDE}"'
            runs.append(f"<text {place}{style}>{escape(text)}</text>")
        x += len(text)
    return "".join(runs)


def draw(cast: Path, picture: Path) -> None:
    made, columns, rows = screens(cast)
    names: dict[str, str] = {}
    strip = []
    for i, (_, lines) in enumerate(made):
        for y, svg in enumerate(lines):
            if svg:
                name = names.setdefault(svg, f"l{len(names)}")
                strip.append(f'<use href="#{name}" y="{(i * (rows + 1) + y) * HIGH}"/>')
    whole, jump = made[-1][0] + REST, (rows + 1) * HIGH
    at = "".join(
        f"{100 * t / whole:.3f}%{{transform:translateY({-i * jump}px)}}"
        for i, (t, _) in enumerate(made)
    )
    w, h = columns * WIDE + 2 * MARGIN, rows * HIGH + 2 * MARGIN
    defs = "".join(f'<g id="{name}">{svg}</g>' for svg, name in names.items())
    picture.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}">'
        f"<style>text{{white-space:pre;dominant-baseline:text-before-edge;font-size:13.3px;"
        f"font-family:ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace}}"
        f"@keyframes play{{{at}}}#strip{{animation:play {whole:.2f}s step-end infinite}}"
        f"@media (prefers-reduced-motion){{#strip{{animation:none;"
        f"transform:translateY({-(len(made) - 1) * jump}px)}}}}</style>"
        f'<defs>{defs}</defs><rect width="{w}" height="{h}" rx="8" fill="{BACK}"/>'
        f'<svg x="{MARGIN}" y="{MARGIN}" width="{columns * WIDE}" height="{rows * HIGH}">'
        f'<g id="strip">{"".join(strip)}</g></svg></svg>\n'
    )
    print(f"{picture}: {len(made)} pictures, {whole:.0f} s, {picture.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
