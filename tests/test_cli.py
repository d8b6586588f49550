"""Bad input gets one sentence and exit code 2; results can be read by a program."""

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import click
import numpy
import pytest
from commands import SMALL, command, succeeds, tinylm, write_rows
from safetensors.numpy import load_file, save_file

from tinylm.cli import cli, run
from tinylm.errors import asked_to_stop
from tinylm.progress import Progress

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def base(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "base"
    more = [*SMALL, "--max-steps", "20", "--objective", "mixed"]
    succeeds("pretrain", text_file, "--out", out, *more)
    return out


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def refused(capfd, *arguments, saying: str):
    """The command ends with 2 and one line on standard error that says so."""
    code = run([str(a) for a in arguments])
    captured = capfd.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    assert last.startswith("tinylm: ")
    assert saying in last, last
    assert captured.out == ""


def test_an_instruction_set_that_the_machine_lacks_is_named():
    ran = tinylm("selfcheck", TINYLM_ISA="mmx")
    assert ran.returncode == 2
    assert "TINYLM_ISA" in ran.stderr and "mmx" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("late", ["regex", "click"])
def test_ctrl_c_while_it_is_still_importing(late, tmp_path):
    """In the package, which imports regex, and in the command line, which imports click."""
    (tmp_path / f"{late}.py").write_text("print(flush=True)\nimport time\ntime.sleep(60)\n")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with asked_to_stop(lambda *_: None):  # a job of a script's begins deaf to Ctrl-C
        process = subprocess.Popen(
            command("--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "tinylm: interrupted" in told


def test_ctrl_c_of_another_program_is_its_own(tmp_path):
    """A package that imports tinylm, run with -m: it puts away what it has to put away."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import tinylm")
    program = "import atexit\natexit.register(print, 'put away')\nraise KeyboardInterrupt"
    (tmp_path / "other" / "__main__.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-B", "-m", "other"], capture_output=True, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert "put away" in done.stdout
    assert "tinylm: interrupted" not in done.stderr


def test_files_that_cannot_be_read(capfd, tmp_path, text_file):
    out = ("--out", tmp_path / "r", "--max-steps", 1)
    refused(capfd, "pretrain", "nowhere.txt", *out, saying="nowhere.txt: no such file")
    (tmp_path / "empty.txt").touch()
    refused(capfd, "pretrain", tmp_path / "empty.txt", *out, saying="empty.txt")
    (tmp_path / "folder").mkdir()
    refused(capfd, "pretrain", tmp_path / "folder", *out, saying="no text files here")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    refused(capfd, "pretrain", tmp_path / "bad.jsonl", *out, saying="bad.jsonl, line 2")
    assert not (tmp_path / "r").exists() or not any((tmp_path / "r").glob("*.json"))
    refused(capfd, "pretrain", *out, saying="no text was named")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        sqlite3.OperationalError("database or disk is full"),
    ],
    ids=str,
)
def test_a_full_disk_is_told_with_what_to_do(error, capfd, monkeypatch, text_file, tmp_path):
    def full(*_):
        raise error

    monkeypatch.setattr("tinylm.stages.pretrain.list_files", full)
    refused(capfd, "pretrain", text_file, "--out", tmp_path / "r", saying="make room")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("database is locked", "; end what else writes to it, then run it again"),
        ("no such table: run", ""),
    ],
)
def test_what_sqlite_says_gets_no_remedy_but_its_own(said, remedy, capfd, monkeypatch):
    def fails(*_):
        raise sqlite3.OperationalError(said)

    monkeypatch.setattr("tinylm.stages.pretrain.list_files", fails)
    assert run(["pretrain", "x", "--out", "r"]) == 2
    assert capfd.readouterr().err == f"tinylm: SQLite: {said}{remedy}\n"


def test_a_file_in_the_place_of_a_directory_is_told_with_what_to_do(capfd, text_file):
    made = "tokenizer", text_file, "--vocab-size", 300, "--out"
    refused(capfd, *made, text_file, saying="that is a file; name a directory")
    refused(capfd, *made, text_file / "in", saying="that is a file; name a directory")


def test_what_a_sentence_cites_cannot_move_the_cursor(capfd):
    refused(capfd, "pretrain", "\x1b[2Jnothing", "--out", "r", saying="?[2Jnothing")


def test_a_line_that_goes_to_a_file_is_not_broken(capfd):
    Progress().say("word " * 60)
    assert capfd.readouterr().err.count("\n") == 1


def test_a_place_that_cannot_hold_a_run_is_told_before_any_work(capfd, tmp_path, text_file):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        refused(capfd, "pretrain", text_file, "--out", place, saying="file is no directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(capfd, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "a.txt").chmod(0)
    refused(
        capfd, "pretrain", tmp_path / "a.txt", "--out", tmp_path / "r", "--max-steps", 1,
        saying="a.txt",
    )  # fmt: skip


def test_text_that_is_too_short(capfd, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words only, and then a few more of them")
    arguments = ["pretrain", short, "--out", tmp_path / "r", "--max-steps", 1]
    refused(capfd, *arguments, "--vocab-size", 4096, saying="--vocab-size")
    refused(
        capfd, *arguments[:3], tmp_path / "r2", *arguments[4:], "--tokenizer", "characters",
        saying="fewer than one context of 256",
    )  # fmt: skip


def test_settings_that_make_no_sense(capfd, tmp_path, text_file):
    start = ["pretrain", text_file, "--out", tmp_path / "r", "--max-steps", 1]
    refused(capfd, *start, "--n-head", 5, saying="n_head 5 must divide n_embd 192")
    refused(capfd, *start, "--batch-size", 0, saying="--batch-size")
    refused(capfd, *start, "--learning-rate", "fast", saying="'fast'")
    refused(capfd, *start, "--learning-rate", "inf", saying="--learning-rate: expected a finite")
    refused(capfd, *start[:-2], "--minutes", "nan", saying="--minutes: expected a finite")
    refused(capfd, *start, "--objective", "previous", saying="previous")
    refused(capfd, *start, "--batch-sise", 4, saying="--batch-size")
    refused(capfd, *start, "--preset", "nanogtp-cpu", saying="nanogpt-cpu")
    refused(capfd, "pretrian", text_file, saying="pretrain")
    refused(capfd, *start, "--tokenizer", "nowhere", saying="nowhere")
    refused(capfd, *start, "--n-kv-head", 3, saying="n_kv_head")
    shape = ("--architecture", "gpt2", "--n-kv-head", 1)
    refused(capfd, *start, *shape, saying="a gpt2 model has as many as n_head")
    refused(capfd, *start, "--seed", -1, saying="--seed: expected at least 0")
    refused(capfd, *start, "--beta2", 1, saying="--beta2: expected 0 or more, below 1")
    refused(capfd, *start, "--eval-tokens", -5, saying="--eval-tokens: expected at least 0")


def test_a_directory_that_holds_another_run(capfd, base, text_file):
    refused(capfd, "pretrain", text_file, "--out", base, "--max-steps", 1, saying="--resume")


def test_resuming_does_not_write_over_what_is_no_run(capfd, base, copy, tmp_path, text_file):
    rows = write_rows(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    more = ["sft", base, "--data", rows, "--resume", "--out"]
    refused(capfd, *more, copy, saying="holds a run of pretrain: choose another --out")
    refused(capfd, *more, copy, "--batch-size", 9, saying="holds a run of pretrain")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    refused(capfd, *more, tmp_path / "project", saying="holds other files")
    assert (tmp_path / "project" / "README.md").read_text() == "mine"


def test_memory_that_will_not_suffice(capfd, tmp_path, text_file):
    refused(
        capfd, "pretrain", text_file, "--out", tmp_path / "r", "--max-steps", 1, *SMALL,
        "--batch-size", 20_000_000, saying="--batch-size",
    )  # fmt: skip


def broken(name):
    def missing(folder, file):
        (folder / file).unlink()

    def truncated(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])

    def oversized(folder):
        path = folder / "model.safetensors"
        path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])

    def misshapen(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] = numpy.ones(7, "float32")
        save_file(tensors, path, {"format": "pt"})

    def lacking(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.norm.weight"]
        save_file(tensors, path, {"format": "pt"})

    def config(folder, **change):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return {
        "no config": (lambda f: missing(f, "config.json"), "config.json: no such file"),
        "no weights": (lambda f: missing(f, "model.safetensors"), "model.safetensors: no such"),
        "no tokenizer": (lambda f: missing(f, "tokenizer.json"), "tokenizer.json: no such file"),
        "truncated": (truncated, "not a whole safetensors file"),
        "oversized header": (oversized, "not a whole safetensors file"),
        "wrong shape": (misshapen, "model.norm.weight has shape (7,)"),
        "missing tensor": (lacking, "model.norm.weight is missing"),
        "architecture": (lambda f: config(f, model_type="bert"), "'bert' is not supported"),
        "field": (lambda f: config(f, rope_scaling={"type": "linear"}), "rope_scaling"),
        "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        "vocabulary": (lambda f: config(f, vocab_size=10), "do not belong together"),
    }[name]


@pytest.mark.parametrize("name", [
    "no config", "no weights", "no tokenizer", "truncated", "oversized header", "wrong shape",
    "missing tensor", "architecture", "field", "not JSON", "vocabulary",
])  # fmt: skip
def test_a_broken_model_directory(capfd, copy, name):
    breaks, saying = broken(name)
    breaks(copy)
    refused(capfd, "generate", copy, "the cat", saying=saying)


def test_no_directory_at_all(capfd, tmp_path):
    refused(capfd, "generate", tmp_path / "x", "hello", saying="no such directory")


def test_a_blank_is_needed(capfd, base):
    refused(capfd, "fill", base, "no blank here", saying="one blank ___")


def test_generate(capfd, base):
    settings = ["--max-new-tokens", "20", "--seed", "4"]
    assert run(["generate", str(base), "the cat", *settings]) == 0
    shown = capfd.readouterr().out
    assert run(["generate", str(base), "the cat", *settings, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert shown == "the cat" + found["continuation"] + "\n"


def test_fill(capfd, base):
    assert run(["fill", str(base), "the cat saw a ___ bird.", "--json"]) == 0
    answers = json.loads(capfd.readouterr().out)["answers"]
    assert 1 <= len(answers) <= 5
    assert all(a["text"].startswith("the cat saw a") for a in answers)
    assert all(a["text"].endswith(" bird.") for a in answers)
    scores = [a["logprob"] for a in answers]
    assert scores == sorted(scores, reverse=True)
    assert run(["fill", str(base), "the cat saw a ___ bird."]) == 0
    captured = capfd.readouterr()
    assert "bird." in captured.out
    assert not captured.err
    assert run(["fill", str(base), "a ___ bird", "--temperature", "1", "--seed", "0"]) == 0


def test_eval_of_the_held_out_part_and_of_a_file(capfd, base, text_file):
    assert run(["eval", str(base), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["bits_per_byte"] > 0
    assert found["xz_bits_per_byte"] > 0
    assert run(["eval", str(base), "--data", str(text_file), "--json"]) == 0
    other = json.loads(capfd.readouterr().out)
    assert other["bytes"] == text_file.stat().st_size
    assert run(["eval", str(base)]) == 0
    assert "bits per byte" in capfd.readouterr().out


def test_info(capfd, base):
    assert run(["info", str(base), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["n_layer"] == 2
    assert facts["step"] == 20
    assert facts["bits_per_byte"] == round(facts["bits_per_byte"], 4)
    assert run(["info", str(base)]) == 0


def test_selfcheck(capfd):
    assert run(["selfcheck", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["ok"]
    assert len(found["kernels"]) >= 10
    assert run(["selfcheck"]) == 0
    assert "attention" in capfd.readouterr().out


def test_a_tokenizer_of_its_own(capfd, text_file, tmp_path):
    out = tmp_path / "t"
    assert run(["tokenizer", str(text_file), "--vocab-size", "300", "--out", str(out)]) == 0
    done = ["pretrain", text_file, "--out", tmp_path / "r", "--tokenizer", out, "--max-steps", 2]
    assert run([*map(str, done), *SMALL[:-2]]) == 0
    ours, theirs = (json.loads((f / "tokenizer.json").read_text()) for f in (out, tmp_path / "r"))
    assert ours == theirs
    ours["added_tokens"] = [t for t in ours["added_tokens"] if t["content"] != "<|middle|>"]
    (out / "tokenizer.json").write_text(json.dumps(ours))
    blanks = ["--objective", "mixed", "--out", tmp_path / "mixed"]
    refused(
        capfd, *done[:2], *blanks, *done[4:], saying="has no <|middle|> token, which --objective"
    )
    again = ["tokenizer", text_file, "--out", tmp_path / "r"]
    refused(capfd, *again, saying="holds a model, whose tokenizer would be lost")


def test_the_installed_command_explains_itself(tmp_path):
    done = succeeds("--help", cwd=tmp_path)
    assert all(name in done.stdout for name in cli.commands)


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_and_every_flag_explains_itself(capfd, name):
    command = cli.commands[name]
    for each in getattr(command, "commands", {"": command}).values():
        assert all(p.help for p in each.params if isinstance(p, click.Option))
    assert run([name, "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert " ".join(command.help.split("\n\n")[0].split()) in shown
    assert f"tinylm {name}" in README


@pytest.mark.parametrize("asked", [(), ("-h",), ("preferences",)])
def test_help_for_whoever_does_not_know_what_to_ask(capfd, asked):
    assert run([*asked]) == 0
    captured = capfd.readouterr()
    assert "Commands:\n" in captured.out
    assert not captured.err


def test_a_limit_beyond_all_threads_is_none(base):
    succeeds("info", base, "--threads", 10**30)


def test_it_runs_from_another_folder_and_without_compiled_kernels(base, tmp_path):
    succeeds("generate", base, "the cat", "--backend", "reference", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_cuda_says_what_is_missing(base):
    done = tinylm("generate", base, "x", "--backend", "cuda")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
