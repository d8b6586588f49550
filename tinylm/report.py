"""What a run shows to the eye: learning curves as a picture, verdicts and answers as tables."""

from __future__ import annotations

import re
from pathlib import Path

import pygal
from pygal.style import Style
from rich.table import Table

from tinylm.checkpoint import write_text
from tinylm.train import read_metrics

WIDTH, HEIGHT = 460, 320  # of one panel, in pixels
STYLE = Style(
    background="white", plot_background="white", colors=("#b5c9dd", "#1d4e89"), opacity=1,
    foreground="#555", foreground_strong="#222", foreground_subtle="#ddd", title_font_size=16,
    guide_stroke_color="#e8e8e8", major_guide_stroke_color="#e8e8e8", guide_stroke_dasharray="0",
    major_guide_stroke_dasharray="0", font_family="sans-serif", label_font_size=11,
    major_label_font_size=11,
)  # fmt: skip
PARTS = {
    "known": "known things, never asked about",
    "reworded": "the same, in a wording never used",
    "withheld": "real things, never read about",
    "invented": "things that do not exist",
}


def curves(panels: list[tuple[str, Path, str]], path: Path) -> None:
    """Write an SVG picture with one panel side by side for each (title, run directory, number).

    The number is a key of metrics.jsonl; pale: every step, dark: its running mean.
    """
    charts = []
    for i, (title, folder, key) in enumerate(panels):
        rows = [r for r in read_metrics(folder) if "lr" in r and r.get(key) is not None]
        points = [(row["step"], row[key]) for row in rows]
        chart = pygal.XY(
            title=title, style=STYLE, js=[], width=WIDTH, height=HEIGHT, show_dots=False,
            show_legend=False, x_title="step", stroke_style={"width": 1.5}, truncate_label=9,
        )  # fmt: skip
        chart.add(key, thinned(points))
        chart.add("mean", thinned(smooth(points)))
        svg = chart.render(is_unicode=True)
        svg = svg[svg.index("<svg") :].replace("<svg", f'<svg x="{i * WIDTH}"', 1)
        charts.append(svg.replace("viewBox", f'width="{WIDTH}" height="{HEIGHT}" viewBox', 1))
    size = f'viewBox="0 0 {len(panels) * WIDTH} {HEIGHT}" width="{len(panels) * WIDTH}"'
    superfluous = re.compile(r"<!--.*?-->|<script.*?</script>", re.DOTALL)
    charts = [superfluous.sub("", chart) for chart in charts]
    write_text(path, f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(charts)}</svg>\n')


def thinned(points: list, most: int = 300) -> list:
    return points[:: max(1, len(points) // most)]


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Running mean over about a hundredth of the run."""
    weight, mean, smoothed = min(1.0, 100 / max(1, len(points))), None, []
    for step, value in points:
        mean = value if mean is None else mean + weight * (value - mean)
        smoothed.append((step, mean))
    return smoothed


def verdicts(stages: dict[str, dict]) -> Table:
    """The share of right, wrong and "I don't know" by kind of question and stage, in percent."""
    table = Table(title="The same questions asked of each stage")
    for heading in ("questions about", "n", "stage", "right", "wrong", "don't know"):
        words = heading in ("questions about", "stage")
        table.add_column(heading, justify="left" if words else "right")
    for part in (name for name in next(iter(stages.values())) if name != "directory"):
        for i, (stage, found) in enumerate(stages.items()):
            shares = [f"{100 * found[part][v]:.1f} %" for v in ("right", "wrong", "idk")]
            about = (PARTS[part], str(found[part]["n"])) if i == 0 else ("", "")
            table.add_row(*about, stage, *shares, end_section=i == len(stages) - 1)
    table.caption = "right: equal to an accepted answer after normalisation"
    return table


def side_by_side(asked: list[tuple[str, str]], said: dict[str, list[str]]) -> Table:
    """(set, question) and what each stage answered."""
    table = Table(title="What they say", show_lines=True)
    for heading in ("", "question", *said):
        table.add_column(heading)
    for i, (name, question) in enumerate(asked):
        table.add_row(name, question, *(shortened(answers[i]) for answers in said.values()))
    return table


def shortened(text: str, most: int = 70) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
