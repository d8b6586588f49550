"""Runs the tinylm command as a user does: in a process of its own."""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

SMALL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "32",
         "--batch-size", "4", "--vocab-size", "300"]  # fmt: skip


def command(*arguments) -> list[str]:
    installed = shutil.which("tinylm", path=sysconfig.get_path("scripts"))
    assert installed, "the tinylm command is not installed beside this Python"
    return [installed, *map(str, arguments)]


def tinylm(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=300, cwd=cwd,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def pretrain(text, out, *more) -> subprocess.CompletedProcess:
    return tinylm("pretrain", text, "--out", out, *SMALL, *more)


def metrics(folder: Path) -> list[dict]:
    lines = (Path(folder) / "training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()
