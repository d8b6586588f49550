"""What the subcommands of the command line share: flags, and how results are told.

A result goes to standard output, as one JSON object with --json; everything else goes to standard
error. The flags of a stage are made of its config dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
from functools import partial, wraps
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm import backend as backends
from tinylm.errors import InputError
from tinylm.files import in_json
from tinylm.progress import Progress
from tinylm.settings import ENDS, Plan, flag


class Commands(click.Group):
    """Lists commands in the order of the work, also when none is named, and knows the nearest name
    to a wrong one."""

    group_class = type  # its groups are of this kind too

    def parse_args(self, context, arguments):
        return super().parse_args(context, arguments or ["--help"])

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


def settings_of(config, command):
    """The command with a flag for each field of a stage's config dataclass."""
    for field in reversed(dataclasses.fields(config)):
        choices = field.metadata["choices"]
        command = click.option(
            flag(field.name),
            type=click.Choice(choices) if choices else None,  # None: that of the default
            is_flag=field.default is False,
            default=field.default,
            help=field.metadata["help"],
        )(command)
    return command


def stage_of(config, then: str, out_required: bool = True):
    """A command that runs a stage: it gets a Plan, made of the flags added here, and returns the
    results; at the end its report is drawn, and `then` told as what to try next."""

    def decorate(command):
        @click.option("--out", required=out_required, type=Path, help="Directory of the run.")
        @click.option("--resume", is_flag=True, help="Continue the run in --out.")
        @partial(settings_of, config)
        @common
        @click.pass_context
        @wraps(command)
        def wrapped(context, out, resume, as_json, **inputs):
            names = [field.name for field in dataclasses.fields(config)]
            settings = config(**{name: inputs.pop(name) for name in names})
            chosen_by = context.get_parameter_source
            given = {name for name in names if chosen_by(name) is not ParameterSource.DEFAULT}
            if given & ENDS:  # who names one end of a run does not want another's default
                for name in ENDS - given:
                    setattr(settings, name, 0)
                given |= ENDS
            plan = Plan(out, settings, Progress(), resume, given)
            results = command(**inputs, plan=plan)
            if results is None:
                return
            from tinylm import report

            report.attempt([out], plan.progress)
            places = {k: shlex.quote(str(v)) for k, v in {**inputs, "out": out}.items()}
            tried = f"{out}: try  {then.format(**places)}"
            tell(as_json, results, tried, err=True)

        return wrapped

    return decorate


def sampling(command):
    """The flags of everything that writes text."""
    seed = click.option("--seed", type=click.IntRange(0), help="Of sampling; none: new each time.")
    top_p = click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, help="Nucleus.")
    top_k = click.option("--top-k", type=click.IntRange(0), default=0, help="Likeliest (0: all).")
    return top_k(top_p(seed(command)))


def tell(as_json: bool, found: dict, *shown: str | Table | Text, err: bool = False) -> None:
    """The result of a command: as one JSON object, or else as what a person is shown."""
    if as_json:
        print(json.dumps(in_json(found), allow_nan=False, default=float))
        return
    for each in shown:
        if isinstance(each, str):
            click.echo(each, err=err)
        else:
            Console().print(each, soft_wrap=isinstance(each, Text))
