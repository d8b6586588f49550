"""Runs the tinylm command, and looks at what it left."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import tinylm as package
from tinylm import backend, settings
from tinylm.chat import with_chat_tokens
from tinylm.checkpoint import Checkpoint
from tinylm.cli import run
from tinylm.tokenizer import train_characters

SMALL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "32",
         "--batch-size", "4", "--vocab-size", "300"]  # fmt: skip


def command(*arguments) -> list[str]:
    installed = shutil.which("tinylm", path=sysconfig.get_path("scripts"))
    assert installed, "the tinylm command is not installed beside this Python"
    return [installed, *map(str, arguments)]


def tinylm(*arguments, said="", cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run a command; said: what is typed, on standard input.

    In a process of its own where it gets another folder or environment; else in this one, which
    saves the second that starting it takes.
    """
    if cwd or environment:
        return subprocess.run(
            command(*arguments), input=said, capture_output=True, text=True, timeout=300, cwd=cwd,
            env={**os.environ, **environment}, check=False,
        )  # fmt: skip
    out, err, name, threads = io.StringIO(), io.StringIO(), backend.name, backend.threads()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(said))
        code = run([*map(str, arguments)])
    backend.use(name)
    if backend.threads() != threads:
        backend.set_threads(threads)
    while settings.claimed:  # as where a process ends
        settings.claimed.popitem()[1].close()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def succeeds(*arguments, **more) -> subprocess.CompletedProcess:
    """`tinylm`, which must end with 0."""
    done = tinylm(*arguments, **more)
    assert done.returncode == 0, done.stderr
    return done


def refused(*arguments, saying: str, **more) -> subprocess.CompletedProcess:
    """The command ends with 2 and a sentence."""
    done = tinylm(*arguments, **more)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert saying in " ".join(done.stderr.split()), done.stderr
    return done


def python(program: str, *arguments, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    """Run a program, which must end with this code, outside the checkout: its tinylm is not
    compiled."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, *map(str, arguments)], capture_output=True, text=True,
        timeout=300, cwd=cwd, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def pretrain(text, out, *more) -> subprocess.CompletedProcess:
    return succeeds("pretrain", text, "--out", out, *SMALL, *more)


def steps_done(out: Path) -> int:
    """Lines in the log: more of them say that a run is under way."""
    log = out / "training" / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_at_random(times: int, out: Path, *arguments) -> int:
    """Run a command so often, and kill it after a step or two: most often in the middle of a save,
    if it saves after every step. Returns how often it was not over before; its directory opens each
    time."""
    kills = 0
    for seed in range(times):
        process = subprocess.Popen(
            command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = steps_done(out)
        while process.poll() is None and steps_done(out) <= before + 1:
            time.sleep(0.002)
        time.sleep(random.Random(seed).random() * 0.05)
        process.kill()
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        if Checkpoint(out).exists() and (out / "model.safetensors").exists():
            package.load(out)  # whatever moment it was, the directory opens
    return kills


def metrics(folder: Path) -> list[dict]:
    lines = (Path(folder) / "training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def untrained(folder: Path, characters: str, *shape: int) -> Path:
    """A model of random weights that chats in these characters, in a directory."""
    tokenizer, _ = with_chat_tokens(train_characters([characters]))
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = package.ModelConfig(tokenizer.vocab_size, *shape, **special)
    package.save(package.Transformer(config, 1), tokenizer, folder)
    return folder


def weights(folder: Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()
