"""The command line: subcommands, flags, and how mistakes are told.

Results go to standard output (one JSON object with
--json), everything else to standard error. Exit codes: 0 done, 2 the input is wrong (one line, no
traceback), 75 a person's judgement is waited for, 130 interrupted with progress saved.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from functools import wraps
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table
from rich.text import Text

import tinylm
from tinylm import agreement, data, preferences, store
from tinylm import backend as backends
from tinylm.checkpoint import Checkpoint, write_text
from tinylm.errors import InputError, Waiting
from tinylm.evaluate import evaluate_directory
from tinylm.generate import BLANK, Conversation, stream_text
from tinylm.llama2c import load_llama2c
from tinylm.progress import Progress
from tinylm.selfcheck import selfcheck as check_kernels
from tinylm.stages import feedback as improving
from tinylm.stages import preference as preferring
from tinylm.stages import pretrain as pretraining
from tinylm.stages import sft as fine_tuning
from tinylm.tokenizer import train_bpe, train_characters
from tinylm.train import read_metrics

TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def main() -> None:
    """The `tinylm` command."""
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
        print("\ntinylm: interrupted; what was saved is intact", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tinylm ... | head`
        sys.stdout = None
        return 0
    except MemoryError:
        return mistake("out of memory: use a smaller --batch-size, --block-size or --n-embd")
    except OSError as error:
        if error.strerror is None:
            raise
        return mistake(f"{error.filename or 'file'}: {error.strerror}")
    return 0


def mistake(sentence: str) -> int:
    print("tinylm: " + " ".join(sentence.split()), file=sys.stderr)
    return 2


class Group(click.Group):
    """Lists commands in the order of the work, and knows the nearest name to a wrong one."""

    def list_commands(self, context):
        return list(self.commands)

    def resolve_command(self, context, arguments):
        try:
            return super().resolve_command(context, arguments)
        except click.UsageError as error:
            raise click.UsageError(error.message + nearest(arguments[0], self.commands)) from None


def nearest(name: str, known) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {found[0]}?" if found else f" Known: {', '.join(known)}."


@click.group(cls=Group, context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="tinylm")
def cli():
    """From raw text to an assistant, from scratch."""


def common(command):
    """The flags of every subcommand; sets backend and threads before the command runs."""

    @click.option("--backend", type=click.Choice(["reference", "cpu", "cuda"]), help="Kernels.")
    @click.option("--threads", type=click.IntRange(1), help="Limit of every thread pool.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the result.")
    @wraps(command)
    def wrapped(*args, backend, threads, **kwargs):
        if backend:
            backends.use(backend)
        if threads:
            backends.set_threads(threads)
        try:
            backends.describe()  # the first look at the kernels chooses their instruction set
        except ValueError as error:
            raise InputError(str(error)) from None
        return command(*args, **kwargs)

    return wrapped


def settings_of(config):
    """A flag for each field of a stage's config dataclass."""

    def decorate(command):
        for field in reversed(dataclasses.fields(config)):
            choices = field.metadata["choices"]
            command = click.option(
                "--" + field.name.replace("_", "-"),
                type=click.Choice(choices) if choices else TYPES[field.type],
                is_flag=field.type == "bool",
                default=field.default,
                help=field.metadata["help"],
            )(command)
        return command

    return decorate


def run_of(config):
    """The flags of a stage that starts from a model: where to, settings, the common ones."""

    def decorate(command):
        for add in (
            click.pass_context,
            common,
            settings_of(config),
            click.option("--resume", is_flag=True, help="Continue the run in --out."),
            click.option("--out", required=True, type=Path, help="Directory of the run."),
        ):
            command = add(command)
        return command

    return decorate


def sampling(command):
    """The flags of everything that writes text."""
    for option in (
        click.option("--seed", type=int, help="Seed of the sampling; none: new each time."),
        click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, help="Nucleus."),
        click.option("--top-k", type=click.IntRange(0), default=0, help="Likeliest (0: all)."),
    ):
        command = option(command)
    return command


def print_json(content: dict) -> None:
    print(json.dumps(content, ensure_ascii=False, allow_nan=False, default=float))


# ---- all of it ---------------------------------------------------------------------------------


@cli.command("quickstart")
@click.option("--out", type=Path, default=Path("runs/quickstart"), help="Directory for all of it.")
@click.option("--seed", type=int, default=0, help="Seeds everything random.")
@common
def quick(out, seed, as_json):
    """All three stages on the almanac, in minutes.

    Run it again to go on after an interruption.
    """
    from tinylm import quickstart  # and with it what draws pictures

    results = quickstart.run(out, Progress(), seed)
    if as_json:
        print_json(results)


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

    found = laboratory.run(claim, out, Progress(), seeds)
    if as_json:
        print_json({"claims": found})


# ---- making models -----------------------------------------------------------------------------


@cli.command()
@click.argument("paths", nargs=-1, metavar="FILE_OR_DIR...")
@click.option("--out", required=True, type=Path, help="Directory of the run.")
@click.option(
    "--preset", help=f"Starting point: {', '.join(pretraining.PRESETS)}.  [default: small]"
)
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@settings_of(pretraining.PretrainConfig)
@common
@click.pass_context
def pretrain(context, paths, out, preset, resume, as_json, **values):
    """Raw text -> a base model.

    Files and folders of plain text, .gz, or JSON lines with a `text` field.
    """
    given = named_by_user(context, values)
    chosen = preset_values(preset, pretraining.PRESETS)
    if given & {"max_steps", "minutes"}:
        chosen = {k: v for k, v in chosen.items() if k not in ("max_steps", "minutes")}
    named = {name: values[name] for name in given}
    config = pretraining.PretrainConfig(**{**values, **chosen, **named})
    given |= set(chosen if preset else ())
    results = pretraining.run(list(paths), out, config, given, resume, Progress())
    done(out, results, as_json, f'tinylm generate {out} "Once upon a time"')


def named_by_user(context: click.Context, values: dict) -> set[str]:
    source = context.get_parameter_source
    return {name for name in values if source(name) is not ParameterSource.DEFAULT}


def preset_values(name: str | None, presets: dict) -> dict:
    if name is not None and name not in presets:
        raise InputError(f"--preset {name}: no such preset." + nearest(name, presets))
    return presets[name or "small"]


def done(out: Path, results: dict, as_json: bool, then: str) -> None:
    """A stage has ended: draw its report, and tell what it found or what to try."""
    from tinylm import report

    report.attempt([out], Progress())
    if as_json:
        print_json(results)
    else:
        click.echo(f"{out}: try  {then}", err=True)


@cli.command()
@click.argument("base", type=Path)
@click.option("--data", required=True, type=Path, help="Conversations: JSON lines, or an array.")
@click.option("--out", type=Path, help="Directory of the run.")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option("--show-mask", type=click.IntRange(0), default=0, help="Show N examples, and stop.")
@settings_of(fine_tuning.SFTConfig)
@common
@click.pass_context
def sft(context, base, data, out, resume, show_mask, as_json, **values):
    """Conversations -> a model that answers.

    Rows are `messages`, or `instruction`, `input`, `output`, or `prompt`, `completion`.
    """
    if show_mask:
        for example in fine_tuning.masks(base, data, show_mask, Progress()):
            Console(highlight=False, soft_wrap=True).print(example)
        return
    if out is None:
        raise InputError("name the directory of the run: --out DIR")
    config = fine_tuning.SFTConfig(**values)
    given = named_by_user(context, values)
    results = fine_tuning.run(base, data, out, config, given, resume, Progress())
    done(out, results, as_json, f"tinylm chat {out}")


@cli.command()
@click.argument("base", metavar="MODEL", type=Path)
@click.option("--data", required=True, type=Path, help="Preferences: JSON lines, or an array.")
@run_of(preferring.RewardConfig)
def reward(context, base, data, out, resume, as_json, **values):
    """Judged answers -> a reward model, which judges.

    Rows are `prompt`, `chosen`, `rejected`, or `prompt`, `answers`, `scores`.
    """
    config = preferring.RewardConfig(**values)
    given = named_by_user(context, values)
    results = preferring.run(base, data, out, config, given, resume, Progress())
    done(out, results, as_json, f"tinylm feedback {base} --judge reward-model --reward-model {out}")


@cli.command()
@click.argument("model", type=Path)
@click.option("--data", required=True, type=Path, help="Preferences: JSON lines, or an array.")
@run_of(preferring.DPOConfig)
def dpo(context, model, data, out, resume, as_json, **values):
    """Judged answers -> a better model, without sampling any (DPO)."""
    config = preferring.DPOConfig(**values)
    given = named_by_user(context, values)
    results = preferring.run(model, data, out, config, given, resume, Progress())
    done(out, results, as_json, f"tinylm chat {out}")


@cli.command()
@click.argument("model", type=Path)
@click.option("--prompts", required=True, type=Path, help="JSON lines: prompt, or messages.")
@run_of(improving.FeedbackConfig)
def feedback(context, model, prompts, out, resume, as_json, **values):
    """A model, prompts and a judge -> a better model.

    The built-in verifier compares answers with the list `accepted` of each row. A person is asked
    on a local page, and has defaults of their own: 4 answers of up to 64 tokens, 4 prompts to each
    of 40 steps, a learning rate of 3e-4.
    """
    config = improving.FeedbackConfig(**values)
    given = named_by_user(context, values)
    results = improving.run(model, prompts, out, config, given, resume, Progress())
    done(out, results, as_json, f"tinylm chat {out}")


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
    rows = [*preferences.FORMS[form](store.open_existing(run).judged(judge))]
    if not rows:
        raise InputError(f"{run}: nothing in it is preferred to anything, so there is no row")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(out, text)
    if as_json:
        print_json({"file": str(out), "rows": len(rows)})
    else:
        click.echo(f"{out}: {len(rows):,} rows", err=True)


@judgements.command("import")
@click.argument("file", type=Path)
@click.option("--out", required=True, type=Path, help="Store: made, or added to.")
@click.option("--judge", default="imported", help="Whose judgements these are.")
@common
def import_preferences(file, out, judge, as_json):
    """A file of any of export's forms, or OpenAssistant's trees -> a store."""
    n = store.Store(out).add_all(str(file), preferences.read_preferences(file, ties=True), judge)
    if as_json:
        print_json({"store": str(out), "prompts": n})
    else:
        click.echo(f"{out}: {n:,} judged prompts added", err=True)


@judgements.command("stats")
@click.argument("run", type=Path, metavar="RUN_OR_STORE")
@common
def count_preferences(run, as_json):
    """How many judgements there are, by whom, and how far the judges agree."""
    found = agreement.statistics(store.open_existing(run))
    if as_json:
        print_json(found)
        return
    for table in agreement.tables(found):
        Console().print(table)


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="FILE_OR_DIR...")
@click.option("--out", required=True, type=Path, help="Directory for tokenizer.json.")
@click.option("--vocab-size", type=click.IntRange(1), default=4096, help="Special tokens counted.")
@click.option("--characters", is_flag=True, help="One token per character instead of a BPE.")
@click.option("--document-separator", default="", help="A string between documents.")
@common
def tokenizer(paths, out, vocab_size, characters, document_separator, as_json):
    """Learn a vocabulary from text."""
    files = data.list_files(paths)
    size = sum(path.stat().st_size for path in files)
    with Progress().counting("vocabulary", size) as seen:
        texts = (text for text, _ in data.read_texts(files, document_separator, seen))
        made = train_characters(texts) if characters else train_bpe(texts, vocab_size)
    made.save(out)
    if as_json:
        print_json({"directory": str(out), "vocab_size": made.vocab_size})


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
    if as_json:
        print_json({"directory": str(out), "parameters": loaded.n_parameters()})


# ---- using models ------------------------------------------------------------------------------


def open_model(path: Path, with_tokenizer: bool = True):
    model, made = tinylm.load(path)
    if with_tokenizer and made is None:
        raise InputError(f"{path}/tokenizer.json: no such file; text needs it")
    return model, made


@cli.command()
@click.argument("model", type=Path)
@click.argument("prompt", default="")
@click.option("--max-new-tokens", type=click.IntRange(0), default=200, help="Length, in tokens.")
@click.option("--temperature", type=click.FloatRange(0), default=0.8, help="0 is greedy.")
@sampling
@common
def generate(model, prompt, as_json, **settings):
    """Continue PROMPT."""
    loaded, made = open_model(model)
    pieces = stream_text(loaded, made, prompt, **settings)
    if as_json:
        print_json({"prompt": prompt, "continuation": "".join(pieces)})
        return
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@cli.command()
@click.argument("model", type=Path)
@click.option("--system", default="", help="What the assistant is told before you speak.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.5, help="0 is greedy.")
@sampling
@common
def chat(model, system, as_json, **settings):
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D ends the talk.

    Without a terminal every line of standard input is one turn. `/new` begins anew.
    """
    loaded, made = open_model(model)
    talk = Conversation(loaded, made, system, settings)
    live = sys.stdin.isatty() and not as_json
    console = Console(highlight=False, soft_wrap=True)
    if not talk.answers:
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
                raise
            console.print(Text(str(error), "yellow"))
            continue
        for piece in pieces:
            if not as_json:
                console.print(Text(piece, "bold"), end="")
        if not as_json:
            console.print("\n" if live else "")
        if talk.forgotten:
            click.echo(f"(the first {talk.forgotten} messages no longer fit the context)", err=True)
    if as_json:
        print_json({"messages": talk.messages})


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
    loaded, made = open_model(model)
    found = tinylm.fill(loaded, made, text, **settings)
    before, after = text.split(BLANK)
    before = before.removesuffix(" ")
    if as_json:
        answers = [
            {"answer": answer.strip(), "text": before + answer + after, "logprob": logp}
            for answer, logp in found
        ]
        print_json({"answers": answers})
        return
    console = Console(highlight=False, soft_wrap=True)
    for answer, logp in found:
        chance = "" if logp is None else f"{100 * math.exp(logp):5.1f} %  "
        console.print(Text.assemble((chance, "dim"), before, (answer, "bold green"), after))


@cli.command("eval")
@click.argument("model", type=Path)
@click.option("--data", "paths", multiple=True, help="Text to judge by.  [default: held-out part]")
@click.option("--document-separator", default="", help="A string between documents.")
@click.option("--block-size", type=click.IntRange(0), default=0, help="Window (0: the context).")
@click.option("--batch-size", type=click.IntRange(1), default=16, help="Windows at once.")
@common
def evaluate(model, paths, document_separator, block_size, batch_size, as_json):
    """Bits per byte of held-out text, beside xz."""
    loaded, made = open_model(model)
    if block_size > loaded.config.block_size:
        raise InputError(f"--block-size {block_size}: the context is {loaded.config.block_size}")
    found = evaluate_directory(
        loaded, made, model, list(paths), document_separator, block_size, batch_size
    )
    if as_json:
        print_json(found)
        return
    click.echo(f"loss           {found['loss']:.4f} nats per token ({found['tokens']:,} tokens)")
    click.echo(f"perplexity     {found['perplexity']:.2f}")
    click.echo(f"bits per byte  {found['bits_per_byte']:.3f} ({found['bytes']:,} bytes)")
    if found.get("xz_bits_per_byte"):
        click.echo(f"xz             {found['xz_bits_per_byte']:.3f} bits per byte")


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
    if as_json:
        print_json({"report": str(out)})
    else:
        click.echo(f"{out}: open it in a browser", err=True)


@cli.command()
@click.argument("model", type=Path)
@common
def info(model, as_json):
    """What a model directory holds."""
    loaded, made = open_model(model, with_tokenizer=False)
    facts = {**dataclasses.asdict(loaded.config), "parameters": loaded.n_parameters()}
    facts["tokenizer"] = made is not None
    facts["backend"] = backends.describe()
    checkpoint = Checkpoint(model)
    if checkpoint.exists():
        state = checkpoint.state()
        facts |= {"step": state["step"], "training_seconds": round(state["seconds"], 1)}
        evals = [row for row in read_metrics(model) if "bits_per_byte" in row]
        facts |= {"bits_per_byte": evals[-1]["bits_per_byte"]} if evals else {}
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        click.echo(f"{name:18} {shown}")


@cli.command()
@common
def selfcheck(as_json):
    """The parity certificate: every kernel against finite differences and the reference."""
    found = check_kernels(backends.kernels)
    if as_json:
        rows = [dataclasses.asdict(row) for row in found.rows]
        print_json({"backend": backends.describe(), "ok": found.ok, "kernels": rows})
    else:
        table = Table(title=f"tinylm selfcheck: {backends.describe()}")
        for heading in ("kernel", "cases", "gradient error", "parity error", ""):
            table.add_column(heading, justify="left" if heading == "kernel" else "right")
        for row in found.rows:
            gradient = "-" if row.gradient_error is None else f"{row.gradient_error:.1e}"
            parity = f"{max(row.parity_error.values()):.1e}"
            verdict = "[green]ok[/green]" if row.ok else "[red]WRONG[/red]"
            table.add_row(row.kernel, str(row.n_cases), gradient, parity, verdict)
        table.caption = (
            "gradient: against central differences in float64; "
            "parity: ‖out − reference‖ / ‖reference‖ in float32; both the worst of all cases"
        )
        Console().print(table)
    if not found.ok:
        raise click.exceptions.Exit(1)


@cli.command("bench")
@click.option("--corpus", multiple=True, metavar="FILE_OR_DIR", help="Text to foretell a run on.")
@common
def measure(corpus, as_json):
    """How fast this machine is: memory, kernels, training with each preset."""
    from tinylm import bench

    found = bench.run(Progress(), data.list_files(corpus) if corpus else [])
    if as_json:
        print_json(found)
        return
    for table in bench.tables(found):
        Console().print(table)
