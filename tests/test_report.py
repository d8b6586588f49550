"""The report card: what stands in it, that it needs nothing else, and that no text becomes HTML."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from importlib import resources
from types import SimpleNamespace

import numpy
import pytest
from commands import SMALL, metrics, write_rows

import tinylm
from tinylm import checkpoint, cli, evaluate, report, xray
from tinylm.charts import Chart, smooth
from tinylm.checkpoint import Checkpoint
from tinylm.runs import Run, find_runs

STAGES = ("base", "sft", "feedback")
EVIL = "<script>alert('é')</script>"
QUICK = ["--max-steps", "6", "--eval-every", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    """A directory with a tiny run of each stage, as the commands leave it."""
    out = tmp_path_factory.mktemp("runs")
    rows = [
        {"prompt": f"{EVIL} {i} + 1?", "completion": f"{EVIL}, {i + 1}", "accepted": [str(i + 1)]}
        for i in range(60)
    ]
    data = str(write_rows(out / "rows.jsonl", rows))
    for command in (
        ["pretrain", str(text_file), "--out", str(out / "base"), *SMALL, "--block-size", "96"],
        ["sft", str(out / "base"), "--data", data, "--out", str(out / "sft")],
        ["feedback", str(out / "sft"), "--prompts", data, "--out", str(out / "feedback"),
         "--batch-size", "4", "--answers", "2", "--max-new-tokens", "4", "--held-out", "4"],
    ):  # fmt: skip
        assert cli.run([*command, *QUICK]) == 0
    return out


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(trained, tmp_path / "runs")


class Page(HTMLParser):
    """Which tags a page opens, which attributes they have, and whether all are closed in turn."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def drawn(*arguments) -> str:
    out = report.write([*arguments])
    return out.read_text()


def test_the_page_is_whole_and_loads_nothing(trained):
    html = drawn(trained)
    page = Page(html)
    assert page.open == []
    loading = {"src", "href", "srcset", "action", "data", "xlink:href"}
    assert not [a for a in page.attributes if a[1] in loading or a[1].startswith("on")]
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html
    for heading in ("What they say", "How they learned", "What they learn from", "What it took"):
        assert heading in page.text


def test_what_models_and_data_say_is_never_html(runs):
    claim = {"title": EVIL, "says": EVIL, "holds": None, "measures": []}
    (runs.parent / "lab").mkdir()
    (runs.parent / "lab" / "claims.json").write_text(json.dumps([claim]))
    out = report.write([runs, runs.parent / "lab"], ask=[EVIL])
    page = Page(out.read_text())
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 8  # claim, the question asked, held-out questions, the mask


def test_every_stage_leaves_a_report_of_its_own(trained):
    base, sft, feedback = ((trained / n / "report.html").read_text() for n in STAGES)
    assert "Text that base had never seen" in base
    assert "GFLOP/s" in base
    assert "<mark>&lt;script&gt;" in sft  # the answer alone is learned
    assert "0 + 1?" in Page(sft).text.partition("A conversation that")[2]
    assert "Reward by drift" in feedback
    assert "core-minutes" in feedback


def test_the_machine_is_recorded_with_the_run(trained):
    where = Checkpoint(trained / "sft").state()["environment"]
    assert where["threads"] == 1
    assert where["peak_gflops"] > 0.1
    run = Run(trained / "base", "base")
    assert 0 < run.utilisation() < 1.5


def test_feedback_records_which_answers_were_right_and_wrong(trained):
    for row in metrics(trained / "feedback")[:2]:  # +1, 0 and −1 are all its scores
        assert row["reward"] == pytest.approx(row["positive"] - row["negative"])


def test_evaluations_refused_updates_and_resumes_are_marked(runs):
    html = drawn(runs / "base")
    assert html.count('class="dot"') == 2
    assert 'class="mark' not in html
    rows = metrics(runs / "base")
    skipped = {"step": 4, "loss": None, "lr": 0.1, "grad_norm": None, "event": "skip"}
    rows[3] = skipped | {"reason": "gradient norm <9> spiked"}
    rows[4] |= {"event": "skip", "reason": "nothing to learn"}  # as where all answers score alike
    rows.insert(4, {"step": 4, "event": "resume"})
    write_rows(runs / "base" / "training" / "metrics.jsonl", rows)
    html = drawn(runs / "base")
    assert "step 4: gradient norm &lt;9&gt; spiked" in html
    assert html.count('class="mark skip"') == 1
    assert html.count('class="mark resume"') == 1


def test_runs_are_compared(runs):
    assert 'class="line other"' not in drawn(runs)
    shutil.copytree(runs / "base", runs / "wider")
    html = drawn(runs / "base", runs / "wider")
    assert html.count('class="line other"') == 2  # each one's loss has the other's beside it
    shutil.copytree(runs / "base", runs.parent / "again" / "base")
    html = drawn(runs, runs.parent / "again")
    assert "runs/base" in html
    assert "again/base" in html


def test_verdicts_have_intervals(runs):
    shares = {"right": 0.5, "wrong": 0.3, "idk": 0.2, "n": 20, "n_effective": {"right": 10}}
    results = {
        "sets": {"known": "known things"},
        "stages": {"sft": {"directory": "x", "known": shares}},
    }
    asked = [{"set": "known things", "question": "1 + 1?", "answer": "zwei"}]
    (runs / "results.json").write_text(json.dumps({**results, "asked": asked}))
    text = Page(drawn(runs)).text
    assert "right (24–76)" in text  # Wilson (1927) of 5 in 10: 0.2366 to 0.7634
    assert "known things · zwei" in text


def test_wilson_intervals():
    newcombe = evaluate.wilson(81 / 263, 263)  # his example (Statistics in Medicine 17, 1998)
    assert newcombe == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert evaluate.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert evaluate.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert evaluate.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_questions_that_are_answered_alike_count_as_one():
    said = ["yes", "no", "no", "yes"]  # about four things, each asked about three times
    alike = [(text, ["yes"], thing) for thing, text in enumerate(said) for _ in range(3)]
    assert evaluate.verdict_shares(alike)["n"] == 12
    # the variance of a mean of 4 things, (n - 1) in its divisor: 0.25 / (0.25 / 3)
    assert evaluate.verdict_shares(alike)["n_effective"]["right"] == 3
    apart = [(text, accepted, i) for i, (text, accepted, _) in enumerate(alike)]
    assert evaluate.verdict_shares(apart)["n_effective"]["right"] == 11
    assert evaluate.effective_n([True] * 5, [1, 1, 2, 2, 3]) == 5  # nothing differs


def test_an_interrupted_run_can_be_looked_at(runs, capsys):
    path = runs / "base" / "training" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "lo')  # killed while it wrote
    assert "What it took" in drawn(runs / "base")
    path.write_text("")
    assert "What it took" in drawn(runs / "base")
    assert cli.run(["report", str(runs / "base"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(runs / "base" / "report.html")}


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}'])
def test_a_broken_line_is_named(runs, capsys, line):
    path = runs / "base" / "training" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines) + "\n")
    assert cli.run(["report", str(runs)]) == 2
    said = capsys.readouterr().err
    assert said == f"tinylm: {path}, line 3: not a JSON object with a step\n"


@pytest.mark.parametrize("content", ["{", "[{}]", "3", '[{"measures": 1}]'])
def test_broken_claims_are_named(tmp_path, capsys, content):
    (tmp_path / "claims.json").write_text(content)
    assert cli.run(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tinylm: {tmp_path}/claims.json: not a list of claims")
    assert said.count("\n") == 1


def test_a_line_that_is_no_row_does_not_stop_info(runs, capsys):
    path = runs / "base" / "training" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"3\n\xff\n")
    assert cli.run(["info", str(runs / "base")]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


def test_what_no_chart_can_hold_is_not_drawn(runs):
    numbers = {"value": math.inf, "low": -1e308, "high": 1e308, "by_seed": [None, math.nan, 1.0]}
    measure = {"name": "gold", **numbers, "n": 3, "chance": None}
    claim = {"title": "", "says": "", "holds": True, "measures": [measure]}
    (runs.parent / "lab").mkdir()
    (runs.parent / "lab" / "claims.json").write_text(json.dumps([claim]))
    rows = metrics(runs / "feedback")
    for row, reward in zip(rows, (1e308, -1e308, 10**400)):
        row["reward"] = reward
    write_rows(runs / "feedback" / "training" / "metrics.jsonl", rows)
    html = drawn(runs, runs.parent / "lab")
    assert not re.search(r' (d|cx|cy)="[^"]*(nan|inf|None)', html)
    assert re.findall(r' d="M(\S+) 8h', html) == ["100.0"]


def test_claims_below_zero_stay_on_their_scale(tmp_path):
    low = {"name": "gold", "value": -1.0, "low": -1.5, "high": 3.0, "by_seed": [-1.5], "n": 3}
    claim = {"title": "", "says": "", "holds": True, "measures": [low | {"chance": None}]}
    (tmp_path / "claims.json").write_text(json.dumps([claim]))
    places = re.findall(r' d="M(\S+) 8[h]', drawn(tmp_path))
    assert [float(x) for x in places] == pytest.approx([0.0, 100 * 0.5 / 4.5])  # the seed, the mean


@pytest.mark.parametrize(
    "content", [{"asked": [{}]}, {"stages": 1}, {"sets": {"known": ""}, "stages": {"sft": {}}}]
)
def test_a_foreign_results_json_is_named(runs, capsys, content):
    (runs / "results.json").write_text(json.dumps(content))
    assert cli.run(["report", str(runs)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tinylm: {runs}/results.json: not what a quickstart found")
    assert said.count("\n") == 1


def test_quickstarts_of_one_name_are_told_apart(trained, tmp_path):
    shares = {"right": 0.5, "wrong": 0.3, "idk": 0.2, "n": 20}
    content = {"sets": {"known": "known things"}, "stages": {"sft": {"known": shares}}}
    results = {tmp_path / of / "quickstart" / "results.json": content for of in ("one", "two")}
    (found,) = report.tested(results)
    assert [*found["stages"]] == ["one/quickstart/sft", "two/quickstart/sft"]
    for of in ("one", "two"):
        shutil.copytree(trained / "sft", tmp_path / of / "quickstart" / "sft")
    names = [run.name for run in find_runs([path.parent for path in results])]
    assert names == ["one/quickstart/sft", "two/quickstart/sft"]


def test_gold_that_is_silent_on_a_step_moves_no_other_score(runs):
    rows = metrics(runs / "feedback")
    steps = [row for row in rows if "kl" in row]
    for row in steps:
        row |= {"kl": float(row["step"]) ** 2, "gold": float(row["step"])}
    del steps[0]["gold"]  # all its answers were None to the function
    write_rows(runs / "feedback" / "training" / "metrics.jsonl", rows)
    run = Run(runs / "feedback", "feedback")
    assert report.drift(run, "gold", 99) == [(s, s) for s in (2, 3, 4, 5, 6)]


def test_a_directory_without_runs_is_refused(tmp_path, capsys):
    for folder, why in ((tmp_path, "no run in it"), (tmp_path / "x", "no such directory")):
        assert cli.run(["report", str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"tinylm: {folder}: {why}")
        assert said.count("\n") == 1


def test_a_report_that_fails_loses_no_run(trained, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, "content", fail)
    data, out = str(trained / "rows.jsonl"), str(tmp_path / "sft")
    command = ["sft", str(trained / "base"), "--data", data, "--out", out, *QUICK]
    assert cli.run([*command, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["steps"] == 6
    assert "the report could not be drawn: no ink" in told.err
    assert tinylm.load(out)


def test_probabilities_are_the_model_s(trained):
    model, tokenizer = checkpoint.load(trained / "base")
    (said,) = xray.answering(model, tokenizer, [[{"content": "The cat"}]], longest=5)
    ids = tokenizer.encode("The cat")
    for piece in said:
        logits = model([ids]).data[0, -1].astype("float64")
        p = numpy.exp(logits - logits.max())
        assert piece.probability == pytest.approx(p.max() / p.sum(), rel=1e-4)  # greedy
        ids.append(int(logits.argmax()))
        assert tokenizer.tokens[ids[-1]].decode() == piece.text

    text = numpy.array(tokenizer.encode("The cat saw a bird."))
    read = xray.reading(model, tokenizer, text)
    loss = model.loss(text[None, :-1], text[None, 1:]).data.sum()
    assert -sum(math.log(p.probability) for p in read) == pytest.approx(float(loss), rel=1e-4)
    assert (
        tokenizer.decode(text[:1].tolist()) + "".join(p.text for p in read) == "The cat saw a bird."
    )


def test_a_character_of_several_tokens_is_one_piece():
    tokens = [b"a", b"\xc3", b"\xa9", b"\xff", b"<|end|>", b"\xe2"]
    tokenizer = SimpleNamespace(special={"<|end|>": 4}, tokens=tokens)
    found = [*xray.pieces(tokenizer, range(6), [0.5, 0.5, 0.5, 1, 1, 1])]
    assert found == [("a", 0.5, False), ("é", 0.25, False), ("\ufffd", 1, False),
                     ("<|end|>", 1, True), ("\ufffd", 1, False)]  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[0.3], [0.0, 1e-7], [0.693, 0.6931], [2.0, 2.5], [1e-3, 40.0], [-1e4, 1e5]]
)
def test_ticks_lie_on_the_chart(values, log):
    chart = Chart("", "", lines=[("run", [*enumerate(values)])], log=log)
    for axis in (chart.x, chart.y):
        low, high = sorted((axis.start, axis.end))
        assert all(low - 0.1 <= at <= high + 0.1 for at, _ in axis.ticks())
        labels = [text for _, text in axis.ticks()]
        assert len(set(labels)) == len(labels) <= 7
    assert len(chart.y.ticks()) >= (2 if len(values) > 1 else 1)
    ((_, path),) = chart.paths()
    assert path.count("L") == len(values) - 1


def test_a_running_mean_keeps_a_straight_line():
    line = [(i, 3.0 * i) for i in range(500)]
    assert [x for x, _ in smooth(line)] == [x for x, _ in line]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    assert smooth([]) == []


@pytest.mark.parametrize("scheme", [0, 1])
def test_every_text_stands_out(scheme):
    """By at least 4.5 to 1 (WCAG AA), light and dark, whatever a token's shade."""
    css = resources.files("tinylm").joinpath("templates", "report.css").read_text()
    of = [dict(re.findall(r"--(\w+): (#?\w+)", block)) for block in css.split("}")[:2]][scheme]
    rgb = {name: [int(x[i : i + 2], 16) for i in (1, 3, 5)] for name, x in of.items() if "#" in x}

    def mixed(a, b, share):
        return [share * x + (1 - share) * y for x, y in zip(rgb[a], rgb[b])]

    def contrast(a, b):
        parts = [[(((x / 255 + 0.055) / 1.055) ** 2.4) for x in colour] for colour in (a, b)]
        low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in parts)
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(rgb[x], rgb["paper"]) > 4.5 for x in ("ink", "soft", "accent", "alarm"))
    for doubt in (0, 0.2, 0.4, 0.6, 0.8, 1):
        shade = mixed("accent", "paper", doubt * int(of["shade"]) / 100)
        assert contrast(rgb["ink"], shade) > 4.5
        assert contrast(mixed("ink", "soft", doubt), shade) > 4.5  # a special token


@pytest.mark.parametrize("command", ["report", "eval"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("data.json", b""),  # as a power failure may leave it
        ("data.json", b'{"dtype": "uint16"}'),
        ("heldout-00000.bin", b""),
        ("heldout-00000.bin", b"odd"),
        ("heldout-00000.bin", bytes(4)),
    ],
)
def test_damaged_shards_are_told_in_one_sentence(runs, capsys, command, file, content):
    (runs / "base" / "training" / "tokens" / file).write_bytes(content)
    assert cli.run([command, str(runs / "base")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "training/tokens/data.json: " in line


def test_a_run_without_its_tokenizer_is_told_in_one_sentence(runs, capsys):
    (runs / "sft" / "tokenizer.json").unlink()
    assert cli.run(["report", str(runs)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sft/tokenizer.json: no such file" in line
