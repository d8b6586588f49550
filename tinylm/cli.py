"""The command line: its subcommands, and how mistakes are told.

What subcommands share is in flags.py. Exit codes: 0 done, 1 a kernel is wrong (selfcheck), 2 the
input is wrong (one line, no traceback), 75 a person's judgement is waited for, 130 interrupted with
progress saved.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import sqlite3
import sys
from itertools import chain
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

import tinylm
from tinylm import agreement, corpus, preferences, store
from tinylm import backend as backends
from tinylm.checkpoint import Checkpoint, load_for_text
from tinylm.errors import INTERRUPTED, InputError, Waiting
from tinylm.evaluate import evaluate_directory
from tinylm.files import write_rows
from tinylm.flags import Commands, common, sampling, stage_of, tell
from tinylm.generate import BLANK, LONGEST, Conversation, stream_text
from tinylm.llama2c import load_llama2c
from tinylm.progress import Progress, table
from tinylm.selfcheck import selfcheck as check_kernels
from tinylm.stages import feedback as improving
from tinylm.stages import preference as preferring
from tinylm.stages import pretrain as pretraining
from tinylm.stages import sft as fine_tuning
from tinylm.tokenizer import train_bpe, train_characters
from tinylm.train import read_metrics


def main() -> None:
    """The `tinylm` command."""
    for stream in filter(None, (sys.stdin, sys.stdout)):  # either may be closed
        stream.reconfigure(errors="replace")  # of bytes that are no text
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:  # noqa: PLR0911  (one for each way to end)
    """Run one command; returns its exit code."""
    try:
        cli(arguments, prog_name="tinylm", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return mistake(error.format_message())
    except (InputError, ImportError) as error:
        return mistake(str(error))
    except Waiting as waits:
        print(f"tinylm: {waits}", file=sys.stderr)
        return 75
    except (KeyboardInterrupt, click.Abort):
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tinylm ... | head`
        sys.stdout = None
        return 0
    except MemoryError:
        return mistake("out of memory: use a smaller --batch-size, --block-size, --n-embd or --n")
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return mistake(where + error.strerror + REMEDIES.get(error.errno, ""))
    except sqlite3.OperationalError as error:
        return mistake(f"SQLite: {error}{REMEDIES.get(str(error), '')}")
    return 0


def mistake(sentence: str) -> int:
    """Print it on one line, without control characters, which what it cites may hold."""
    line = " ".join(sentence.split())
    print("tinylm: " + "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    return 2


FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # a disk, a quota, what a file may hold
REMEDIES = dict.fromkeys(FULL, "; make room, then run it again")
REMEDIES["database or disk is full"] = REMEDIES[errno.ENOSPC]  # as SQLite tells it
REMEDIES["database is locked"] = "; end what else writes to it, then run it again"
REMEDIES |= dict.fromkeys((errno.EEXIST, errno.ENOTDIR), ": that is a file; name a directory")
HELP = {"show_default": True, "max_content_width": 100, "help_option_names": ["-h", "--help"]}


@click.group(cls=Commands, context_settings=HELP)
@click.version_option(package_name="tinylm")
def cli():
    """From raw text to an assistant, from scratch."""


# ---- all of it ---------------------------------------------------------------------------------


@cli.command("quickstart")
@click.option("--out", type=Path, default=Path("runs/quickstart"), help="Directory for all of it.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seeds everything random.")
@common
def quick(out, seed, as_json):
    """All three stages on the almanac, in minutes.

    Run it again to go on after an interruption.
    """
    from tinylm import quickstart  # and with it what draws pictures

    tell(as_json, quickstart.run(out, Progress(), seed))


@cli.command()
@click.argument("claim")
@click.option("--out", type=Path, default=Path("runs/lab"), help="Directory for all of it.")
@click.option("--seeds", type=click.IntRange(1), default=3, help="How often, each time anew.")
@common
def lab(claim, out, seeds, as_json):
    """Measure a CLAIM about the three stages, or all of them.

    Run it again to go on after an interruption.
    """
    from tinylm import lab as laboratory

    tell(as_json, {"claims": laboratory.run(claim, out, Progress(), seeds)})


# ---- making models -----------------------------------------------------------------------------


@cli.command()
@click.argument("paths", nargs=-1, metavar="FILE_OR_DIR...")
@click.option(
    "--preset", type=click.Choice([*pretraining.PRESETS]), help="Starting point.  [default: small]"
)
@stage_of(pretraining.PretrainConfig, 'tinylm generate {out} "Once upon a time"')
def pretrain(paths, preset, plan):
    """Raw text -> a base model.

    Files and folders of plain text, .gz, or JSON lines with a `text` field.
    """
    values = pretraining.PRESETS[preset or "small"].items()
    values = {name: value for name, value in values if name not in plan.given}
    config, given = dataclasses.replace(plan.config, **values), {*(values if preset else ())}
    plan = dataclasses.replace(plan, config=config, given=plan.given | given)
    return pretraining.run(list(paths), plan)


@cli.command()
@click.argument("base", type=Path)
@click.option("--data", required=True, type=Path, help="Conversations: JSON lines, or an array.")
@click.option("--show-mask", type=click.IntRange(0), default=0, help="Show N examples, and stop.")
@stage_of(fine_tuning.SFTConfig, "tinylm chat {out}", out_required=False)
def sft(base, data, show_mask, plan):
    """Conversations -> a model that answers.

    Rows are `messages`, or `instruction`, `input`, `output`, or `prompt`, `completion`.
    """
    if show_mask:
        shown = fine_tuning.masks(base, data, show_mask, plan.progress)
        as_json = click.get_current_context().params["as_json"]
        tell(as_json, {"examples": shown}, *map(fine_tuning.coloured, shown))
        return None
    if plan.out is None:
        raise InputError("name the directory of the run: --out DIR")
    return fine_tuning.run(base, data, plan)


@cli.command()
@click.argument("base", metavar="MODEL", type=Path)
@click.option("--data", required=True, type=Path, help="Preferences: JSON lines, or an array.")
@stage_of(
    preferring.RewardConfig,
    "tinylm feedback {base} --prompts FILE --judge reward-model --reward-model {out} --out DIR",
)
def reward(base, data, plan):
    """Judged answers -> a reward model, which judges.

    Rows are `prompt`, `chosen`, `rejected`, or `prompt`, `answers`, `scores`.
    """
    return preferring.run(base, data, plan)


@cli.command()
@click.argument("model", type=Path)
@click.option("--data", required=True, type=Path, help="Preferences: JSON lines, or an array.")
@stage_of(preferring.DPOConfig, "tinylm chat {out}")
def dpo(model, data, plan):
    """Judged answers -> a better model, without sampling any (DPO)."""
    return preferring.run(model, data, plan)


@cli.command()
@click.argument("model", type=Path)
@click.option("--prompts", required=True, type=Path, help="JSON lines: prompt, or messages.")
@stage_of(improving.FeedbackConfig, "tinylm chat {out}")
def feedback(model, prompts, plan):
    """A model, prompts and a judge -> a better model.

    The built-in verifier compares answers with the list `accepted` of each row. A person is asked
    on a local page, and has defaults of their own: 4 answers of up to 64 tokens, 4 prompts to each
    of 40 steps, a learning rate of 3e-4.
    """
    return improving.run(model, prompts, plan)


@cli.group("preferences")
def judgements():
    """What was judged: export it, import it, count it."""


@judgements.command("export")
@click.argument("run", type=Path, metavar="RUN_OR_STORE")
@click.option("--out", required=True, type=Path, help="JSON lines to write.")
@click.option("--form", type=click.Choice([*preferences.FORMS]), default="preference", help="Rows.")
@click.option("--judge", help="Only what this judge said.  [default: all]")
@common
def export_preferences(run, out, form, judge, as_json):
    """The judgements of a run -> a file to train on.

    Forms: `preference` (prompt, chosen, rejected), `unpaired` (prompt, completion, label),
    `ranking` (prompt, answers, scores), `conversations` (the best answers, for `tinylm sft`).
    """
    judged = store.open_existing(run).judged(judge)
    rows = [row for each in judged for row in preferences.FORMS[form](each)]
    if not rows:
        raise InputError(f"{run}: nothing in it is preferred to anything, so there is no row")
    write_rows(out, rows)
    tell(as_json, {"file": str(out), "rows": len(rows)}, f"{out}: {len(rows):,} rows", err=True)


@judgements.command("import")
@click.argument("file", type=Path)
@click.option("--out", required=True, type=Path, help="Store: made, or added to.")
@click.option("--judge", default="imported", help="Whose judgements these are.")
@common
def import_preferences(file, out, judge, as_json):
    """A file of any of export's forms, or OpenAssistant's trees -> a store."""
    judged = preferences.read_preferences(file, ties=True)  # first: a wrong file makes no store
    n = store.Store(out).add_all(str(file), judged, judge)
    added = f"{out}: {n:,} judged prompts added"
    tell(as_json, {"store": str(out), "prompts": n}, added, err=True)


@judgements.command("stats")
@click.argument("run", type=Path, metavar="RUN_OR_STORE")
@common
def count_preferences(run, as_json):
    """How many judgements there are, by whom, and how far the judges agree."""
    found = agreement.statistics(store.open_existing(run))
    tell(as_json, found, *agreement.tables(found))


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="FILE_OR_DIR...")
@click.option("--out", required=True, type=Path, help="Directory for tokenizer.json.")
@click.option("--vocab-size", type=click.IntRange(1), default=4096, help="Special tokens counted.")
@click.option("--characters", is_flag=True, help="One token per character instead of a BPE.")
@click.option("--document-separator", default="", help="A string between documents.")
@common
def tokenizer(paths, out, vocab_size, characters, document_separator, as_json):
    """Learn a vocabulary from text."""
    if (out / "config.json").exists():
        raise InputError(f"{out} holds a model, whose tokenizer would be lost: name another")
    files = corpus.list_files(paths)
    size = sum(path.stat().st_size for path in files)
    with Progress().counting("vocabulary", size) as seen:
        texts = (text for text, _ in corpus.read_texts(files, document_separator, seen))
        made = train_characters(texts) if characters else train_bpe(texts, vocab_size)
    made.save(out)
    tell(as_json, {"directory": str(out), "vocab_size": made.vocab_size})


@cli.command()
@click.argument("model_bin", type=Path)
@click.argument("tokenizer_bin", type=Path)
@click.option("--out", required=True, type=Path, help="Directory for the model.")
@common
def convert(model_bin, tokenizer_bin, out, as_json):
    """A model of llama2.c (MODEL_BIN, TOKENIZER_BIN) -> a model directory."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: choose another --out")
    loaded, made = load_llama2c(model_bin, tokenizer_bin)
    tinylm.save(loaded, made, out)
    tell(as_json, {"directory": str(out), "parameters": loaded.n_parameters()})


# ---- using models ------------------------------------------------------------------------------


@cli.command()
@click.argument("model", type=Path)
@click.argument("prompt", default="")
@click.option(
    "--max-new-tokens", type=click.IntRange(0), default=LONGEST, help="Length, in tokens."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.8, help="0 is greedy.")
@sampling
@common
def generate(model, prompt, as_json, **settings):
    """Continue PROMPT."""
    loaded, made = load_for_text(model)
    pieces = stream_text(loaded, made, prompt, **settings)
    if as_json:
        tell(as_json, {"prompt": prompt, "continuation": "".join(pieces)})
        return
    for piece in chain([prompt], pieces, ["\n"]):
        click.echo(piece, nl=False)


@cli.command()
@click.argument("model", type=Path)
@click.option("--system", default="", help="What the assistant is told before you speak.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=LONGEST, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.5, help="0 is greedy.")
@sampling
@common
def chat(model, system, as_json, **settings):
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D ends the talk.

    Without a terminal every line of standard input is one turn. `/new` begins anew.
    """
    loaded, made = load_for_text(model)
    talk = Conversation(loaded, made, system, settings)
    live = sys.stdin.isatty() and not as_json
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    if not talk.can_answer:
        click.echo(
            f"{model} is a base model: it was never taught to answer, so it continues what you "
            "write.",
            err=True,
        )
    for said in questions(console, live):
        if said == "/new":
            talk.messages.clear()
            continue
        try:
            pieces = talk.ask(said)
        except InputError as error:
            if not live:
                tell(as_json, {"messages": talk.messages})  # what was said until then
                raise
            console.print(Text(str(error), "yellow"))
            continue
        try:
            for piece in pieces:
                console.print(Text(piece, "bold"), end="")
        except KeyboardInterrupt:  # it came while a piece was printed
            pieces.close()
        console.print("\n" if live else "")
        if talk.forgotten:
            click.echo(f"(the first {talk.forgotten} messages no longer fit the context)", err=True)
    tell(as_json, {"messages": talk.messages})


def questions(console: Console, live: bool):
    """What the person types, line by line, until the end of input, Ctrl-C or `/quit`."""
    if not live:
        yield from (line for line in map(str.strip, sys.stdin) if line)
        return
    while True:
        try:
            said = console.input("[green]you[/green]  ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if said in ("/quit", "/exit"):
            return
        if said:
            yield said


@cli.command()
@click.argument("model", type=Path)
@click.argument("text")
@click.option("--n", type=click.IntRange(1), default=5, help="How many answers.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0: beam search.")
@sampling
@common
def fill(model, text, as_json, **settings):
    """Fill the blank ___ in TEXT."""
    loaded, made = load_for_text(model)
    found = tinylm.fill(loaded, made, text, **settings)
    run = Checkpoint(model)
    if run.exists() and run.state()["config"].get("objective") == "next":
        click.echo(
            f"{model} was trained with the objective next and has never filled a blank, so it "
            "guesses: pre-train a model with --objective missing or mixed",
            err=True,
        )
    before, after = text.split(BLANK)
    before = before.removesuffix(" ")
    answers, shown = [], []
    for answer, logp in found:
        whole = before + answer + after
        answers.append({"answer": answer.strip(), "text": whole, "logprob": logp})
        chance = "" if logp is None else f"{100 * math.exp(logp):5.1f} %  "
        shown.append(Text.assemble((chance, "dim"), before, (answer, "bold green"), after))
    tell(as_json, {"answers": answers}, *shown)


@cli.command("eval")
@click.argument("model", type=Path)
@click.option("--data", "paths", multiple=True, help="Text to judge by.  [default: held-out part]")
@click.option("--document-separator", default="", help="A string between documents.")
@click.option("--block-size", type=click.IntRange(0), default=0, help="Window (0: the context).")
@click.option("--batch-size", type=click.IntRange(1), default=16, help="Windows at once.")
@common
def evaluate(model, paths, document_separator, as_json, **sizes):
    """Bits per byte: of a run's held-out text, beside xz, or of --data."""
    loaded, made = load_for_text(model)
    asked, most = sizes["block_size"], loaded.config.block_size
    if asked > most:
        raise InputError(f"--block-size {asked}: the context is {most}")
    found = evaluate_directory(loaded, made, model, [*paths], document_separator, **sizes)
    shown = [
        "loss           {loss:.4f} nats per token ({tokens:,} tokens)",
        "perplexity     {perplexity:.2f}",
        "bits per byte  {bits_per_byte:.3f} ({bytes:,} bytes)",
    ]
    if found["xz_bits_per_byte"]:
        shown.append("xz             {xz_bits_per_byte:.3f} bits per byte")
    tell(as_json, found, *(line.format(**found) for line in shown))


@cli.command("report")
@click.argument("directories", nargs=-1, required=True, type=Path, metavar="DIR...")
@click.option("--out", type=Path, help="File to write.  [default: report.html in the first DIR]")
@click.option("--ask", multiple=True, metavar="TEXT", help="Ask the models this too.")
@common
def draw_report(directories, out, ask, as_json):
    """One HTML file of what runs have learned, and what it took.

    DIR is a run, or a directory of runs such as a quickstart's; several are compared.
    """
    from tinylm import report

    out = report.write([*directories], out, [*ask])
    tell(as_json, {"report": str(out)}, f"{out}: open it in a browser", err=True)


@cli.command()
@click.argument("model", type=Path)
@common
def info(model, as_json):
    """What a model directory holds."""
    loaded, made = tinylm.load(model)
    facts = {**dataclasses.asdict(loaded.config), "parameters": loaded.n_parameters()}
    facts |= {"tokenizer": made is not None, "backend": backends.describe()}
    checkpoint = Checkpoint(model)
    if checkpoint.exists():
        state = checkpoint.state()
        facts |= {"step": state["step"], "training_seconds": round(state["seconds"], 1)}
        found = [row["bits_per_byte"] for row in read_metrics(model) if row.get("bits_per_byte")]
        facts |= {"bits_per_byte": round(found[-1], 4)} if found else {}
    shown = {k: f"{v:,}" if type(v) is int else v for k, v in facts.items()}
    tell(as_json, facts, *(f"{name:18} {value}" for name, value in shown.items()))


@cli.command()
@common
def selfcheck(as_json):
    """The parity certificate: every kernel against finite differences and the reference."""
    rows, backend = check_kernels(backends.kernels), backends.describe()
    ok = all(row.ok for row in rows)
    headings = ("kernel", "cases", "gradient error", "parity error", "")
    shown = table(f"tinylm selfcheck: {backend}", *headings)
    for row in rows:
        gradient = "-" if row.gradient_error is None else f"{row.gradient_error:.1e}"
        parity = f"{max(row.parity_error.values()):.1e}"
        verdict = "[green]ok[/green]" if row.ok else "[red]WRONG[/red]"
        shown.add_row(row.kernel, str(row.n_cases), gradient, parity, verdict)
    shown.caption = (
        "gradient: against central differences in float64; "
        "parity: ‖out − reference‖ / ‖reference‖ in float32; both the worst of all cases"
    )
    kernels = [dataclasses.asdict(row) for row in rows]
    tell(as_json, {"backend": backend, "ok": ok, "kernels": kernels}, shown)
    if not ok:
        raise click.exceptions.Exit(1)


@cli.command("bench")
@click.option(
    "--corpus", "paths", multiple=True, metavar="FILE_OR_DIR", help="Text to foretell a run on."
)
@common
def measure(paths, as_json):
    """How fast this machine is: memory, kernels, training with each preset."""
    from tinylm import bench

    found = bench.run(Progress(), corpus.list_files(paths) if paths else [])
    tell(as_json, found, *bench.tables(found))
