"""A run survives what happens to long runs, and its result does not depend on it."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from commands import (
    SMALL,
    command,
    kill_at_random,
    metrics,
    pretrain,
    python,
    refused,
    steps_done,
    succeeds,
    tinylm,
    weights,
)

from tinylm import backend, checkpoint, memory
from tinylm.checkpoint import Checkpoint
from tinylm.errors import InputError
from tinylm.files import in_json
from tinylm.model import ModelConfig, Transformer
from tinylm.optim import AdamW, clip_scale, schedule
from tinylm.progress import Progress
from tinylm.settings import TrainConfig, resumed_config
from tinylm.stages.pretrain import PretrainConfig
from tinylm.train import Guard, Trainer

STEPS = ["--max-steps", "60", "--save-every", "4", "--eval-every", "20"]


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = pretrain(text_file, out, *STEPS, "--json")
    return out, json.loads(done.stdout)


def test_a_run_learns_and_leaves_a_whole_directory(finished):
    out, result = finished
    rows = metrics(out)
    losses = [row["loss"] for row in rows if "lr" in row]
    assert len(losses) == 60
    assert losses[-1] < losses[0] - 0.5
    assert result["steps"] == 60
    assert 0 < result["bits_per_byte"] < 10
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "generation_config.json", "README.md", "training"}  # fmt: skip
    assert names <= {path.name for path in out.iterdir()}


def test_bfloat16_learns_as_well(finished, text_file, tmp_path):
    if "avx512bf16" not in backend.kernels.isas():
        pytest.skip("this processor has no AVX512-BF16")
    done = pretrain(text_file, tmp_path / "run", *STEPS, "--json", "--dtype", "bfloat16")
    loss, exact = json.loads(done.stdout)["loss"], finished[1]["loss"]
    assert loss != exact
    assert abs(loss - exact) < 0.01 * exact


def test_bfloat16_on_another_processor_is_a_sentence(text_file, tmp_path):
    arguments = ["pretrain", text_file, "--out", tmp_path / "run", *STEPS, "--dtype", "bfloat16"]
    needs = "bfloat16 needs the instruction set avx512bf16"
    refused(*arguments, saying=needs, TINYLM_ISA="baseline")
    assert not (tmp_path / "run").exists()


def test_transformers_opens_a_run_directory(finished):
    transformers = pytest.importorskip("transformers")
    out, _ = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = checkpoint.load(out)
    ids = tokenizer("the cat saw the moon", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == ours[1].encode("the cat saw the moon")
    gap = model(ids).logits.detach().numpy() - ours[0](ids.numpy()).data
    assert numpy.abs(gap).max() <= 1e-4


def test_killed_at_random_moments_it_ends_with_the_same_bits(finished, text_file, tmp_path):
    """SIGKILL, most often in the middle of a save (there is one after every step)."""
    out = tmp_path / "run"
    every_step = ["--save-every", "1", "--resume"]
    arguments = ["pretrain", text_file, "--out", out, *SMALL, *STEPS, *every_step]
    assert kill_at_random(12, out, *arguments) >= 4
    succeeds(*arguments)
    assert weights(out) == weights(finished[0])
    steps = [row["step"] for row in metrics(out) if "lr" in row]
    assert steps == list(range(1, 61))
    assert any(row.get("event") == "resume" for row in metrics(out))


@pytest.mark.parametrize("more", [["--threads", "1"], ["--recompute"]], ids=" ".join)
def test_what_does_not_change_the_bits(more, finished, text_file, tmp_path):
    pretrain(text_file, tmp_path / "r", *STEPS, *more)
    assert weights(tmp_path / "r") == weights(finished[0])


def test_ctrl_c_saves_and_resume_goes_on(finished, text_file, tmp_path):
    out = tmp_path / "run"
    arguments = [*SMALL, *STEPS, "--save-every", "1000"]
    process = subprocess.Popen(
        command("pretrain", text_file, "--out", out, *arguments), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not steps_done(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert Checkpoint(out).state()["step"] >= 1
    succeeds("pretrain", text_file, "--out", out, *arguments, "--resume")
    assert weights(out) == weights(finished[0])


def test_ctrl_c_while_updates_are_refused_saves_after_one_that_is_not(
    text_file, tmp_path, monkeypatch
):
    """The weights of a refused update may be ruined: they must not replace the last checkpoint."""
    reason, update, save, saved = Guard.reason, Trainer.update, Trainer.save, []

    def asked_at_the_fifth(trainer):
        row = update(trainer)
        trainer.stage.stopping = trainer.step >= 5
        return row

    def refusing(guard, loss, norm, harm=""):
        return reason(guard, loss, norm, "bad" if 4 <= guard.seen < 7 else harm)

    monkeypatch.setattr(Guard, "reason", refusing)
    monkeypatch.setattr(Trainer, "update", asked_at_the_fifth)
    monkeypatch.setattr(Trainer, "save", lambda t: saved.append(t.step) or save(t))
    start = ["pretrain", text_file, "--out", tmp_path / "r", *SMALL, "--max-steps", "20"]
    assert tinylm(*start, "--save-every", "2").returncode == 130
    assert saved == [0, 2, 4, 8]
    skipped = [row["step"] for row in metrics(tmp_path / "r") if row.get("event") == "skip"]
    assert skipped == [5, 6, 7]


def test_two_runs_in_one_directory_do_not_mix(text_file, tmp_path):
    out = tmp_path / "run"
    long = ["pretrain", text_file, "--out", out, *SMALL, "--max-steps", "100000"]
    with subprocess.Popen(command(*long), stderr=subprocess.DEVNULL) as first:
        while not (out / "training" / "tokens").exists():
            assert first.poll() is None
            time.sleep(0.01)
        try:
            refused(*long, "--resume", saying="another process is training in")
        finally:
            first.kill()


def test_others_may_read_what_a_run_leaves(finished):
    modes = {path.stat().st_mode for path in finished[0].rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_resume_on_a_finished_run_is_done(finished, text_file):
    done = succeeds("pretrain", text_file, "--out", finished[0], "--resume", "--json")
    assert json.loads(done.stdout)["steps"] == 60
    assert "finished" in done.stderr


def test_a_kill_between_the_last_checkpoint_and_its_model_is_mended(finished, text_file, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "r")
    (out / "model.safetensors").unlink()
    (out / "README.md").write_text("not finished yet")
    succeeds("pretrain", text_file, "--out", out, "--resume")
    assert weights(out) == weights(finished[0])
    assert (out / "README.md").read_text() == (finished[0] / "README.md").read_text()


def test_a_run_may_lie_in_the_folder_that_it_reads(text_file, tmp_path):
    shutil.copy(text_file, tmp_path / "prose.txt")
    pretrain(tmp_path, tmp_path / "run", "--max-steps", "2")
    succeeds("pretrain", tmp_path, "--out", tmp_path / "run", "--max-steps", "3", "--resume")


def test_numbers_that_are_none_are_null_in_json():
    found = in_json({"a": [math.nan, 1.5, {"b": -math.inf}], "c": "NaN"})
    assert found == {"a": [None, 1.5, {"b": None}], "c": "NaN"}


def test_resume_without_a_checkpoint_starts_at_step_0(text_file, tmp_path):
    pretrain(text_file, tmp_path / "r", "--max-steps", "2", "--resume")
    assert metrics(tmp_path / "r")[0] == {"step": 0, "event": "resume"}


def test_resume_keeps_a_model_whose_checkpoint_was_removed(finished, text_file, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "r")
    (out / "training" / "checkpoint.safetensors").unlink()
    before = weights(out)
    refused("pretrain", text_file, "--out", out, *SMALL, "--max-steps", "2", "--resume",
            saying="holds other files")  # fmt: skip
    assert weights(out) == before


def test_what_may_not_change_on_resume_is_named(finished, text_file):
    out = finished[0]
    changed = ["--resume", "--learning-rate", "0.5"]
    refused("pretrain", text_file, "--out", out, *changed, saying="--learning-rate 0.5")
    config = TrainConfig(max_steps=99, save_every=7)
    assert resumed_config(config, {"max_steps", "save_every"}, out).max_steps == 99


def test_other_text_on_resume_is_refused(finished, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else " * 100)
    refused("pretrain", other, "--out", finished[0], "--resume", saying="other text")


def test_minutes_fit_the_schedule_to_the_time(text_file, tmp_path):
    done = pretrain(text_file, tmp_path / "r", "--minutes", "0.05", "--json")
    rates = [row["lr"] for row in metrics(tmp_path / "r") if "lr" in row]
    assert rates[-1] < 0.25 * max(rates)  # it came down to the floor, 0.1
    assert 3 <= json.loads(done.stdout)["seconds"] < 6
    longer = ["--max-steps", str(len(rates) + 5), "--resume", "--json"]  # the other kind of end
    done = succeeds("pretrain", text_file, "--out", tmp_path / "r", *longer)
    assert json.loads(done.stdout)["steps"] == len(rates) + 5


def test_accumulated_batches_give_the_step_of_one_large_batch(text_file, tmp_path):
    """The mean is over the targets of the whole step, not of each part."""
    runs = [("--batch-size", "4"), ("--batch-size", "2", "--accumulate", "2")]
    losses = []
    for i, settings in enumerate(runs):
        pretrain(text_file, tmp_path / str(i), "--max-steps", "5", *settings)
        losses.append([row["loss"] for row in metrics(tmp_path / str(i)) if "lr" in row])
    assert numpy.allclose(*losses, atol=1e-4)


# ---- parts --------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = Transformer(ModelConfig(11, 1, 2, 2, 8, 16, 8))
    optimizer, kept = AdamW(model.parameters()), Checkpoint(tmp_path)
    kept.save(model, optimizer, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        kept.save(model, optimizer, {"step": 2})
    assert kept.state() == {"step": 1}
    assert not list(tmp_path.rglob("*.partial"))


def limited(text_file, out, at_the_limit: str, code: int):
    """A run whose files may have 300 kB: at more a write fails (SIG_IGN), or kills (SIG_DFL)."""
    program = (
        "import resource, signal, sys;"
        f"signal.signal(signal.SIGXFSZ, signal.{at_the_limit});"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "from tinylm.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    arguments = ["pretrain", text_file, "--out", out, *SMALL, "--n-embd", "64", "--max-steps", "3"]
    return python(program, *arguments, cwd=out.parent, code=code), arguments


def test_a_disk_that_is_full_is_told_in_a_sentence(text_file, tmp_path):
    done, _ = limited(text_file, tmp_path / "r", "SIG_IGN", 2)
    assert "cannot be written" in done.stderr


def test_what_a_kill_leaves_of_a_save_is_gone_after_the_next_one(text_file, tmp_path):
    out = tmp_path / "r"
    _, arguments = limited(text_file, out, "SIG_DFL", -signal.SIGXFSZ)
    assert [*out.rglob(".checkpoint.safetensors.partial/*")]
    succeeds(*arguments, "--resume")
    assert not [*out.rglob(".*")]


def test_the_line_names_the_step_that_its_loss_is_of(capsys):
    """On a GPU the trainer is a step ahead of what is known of its losses."""
    ahead = SimpleNamespace(step=9, seconds=1.0, share_done=lambda: 0.9, config=TrainConfig(10))
    ahead.stage = SimpleNamespace(name="sft")
    Progress().step(ahead, {"step": 8, "loss": 1.5, "tokens_per_second": 7})
    assert "step 8 of 10  loss 1.500" in capsys.readouterr().err


def test_the_line_says_that_it_evaluates():
    shown, progress = [], Progress()
    progress.live, progress.bar = True, SimpleNamespace(update=lambda _, **new: shown.append(new))
    trainer = SimpleNamespace(
        stage=SimpleNamespace(name="sft"), config=TrainConfig(10), seconds=1.0
    )
    trainer.share_done = lambda: 0.5
    progress.evaluating(trainer)
    progress.step(trainer, {"step": 5, "loss": 1.5, "tokens_per_second": 7})
    assert [new["description"] for new in shown] == ["sft: evaluating", "sft"]


def test_the_guard_refuses_what_would_do_harm():
    guard = Guard()
    assert guard.reason(math.nan, 1.0)
    assert guard.reason(1.0, math.inf)
    for _ in range(60):
        assert guard.reason(2.0, 1.0) is None
    assert "spiked" in guard.reason(2.0, 50.0)
    assert guard.reason(2.0, 3.0) is None
    assert guard.refused == 3
    again = Guard(**dataclasses.asdict(guard))  # what a checkpoint keeps is all there is
    assert again == guard


def test_the_guard_ends_a_run_that_cannot_recover():
    guard = Guard()
    with pytest.raises(InputError, match="--learning-rate"):
        for _ in range(50):
            guard.reason(math.nan, math.nan)


def test_a_run_that_failed_leaves_the_checkpoint_from_before(text_file, tmp_path):
    """The first update ruins the weights; what is saved must not be these."""
    wild = ["--learning-rate", "1e12", "--clip", "0", "--max-steps", "200", "--save-every", "7"]
    out = tmp_path / "r"
    done = refused("pretrain", text_file, "--out", out, *SMALL, *wild, saying="50 updates in a row")
    skipped = [row["step"] for row in metrics(out) if row.get("event") == "skip"]
    assert len(skipped) >= 49
    assert all(f"step {step}: update skipped" in done.stderr for step in skipped)
    model, _ = checkpoint.load(out)
    assert max(numpy.abs(p.data).max() for p in model.parameters().values()) <= 1


def test_weights_that_are_not_finite_are_not_saved(text_file, tmp_path):
    """The second update overflows them; those refused after it are too few to end the run."""
    wild = ["--weight-decay", "1e38", "--max-steps", "10"]
    told = "not saved: lower --learning-rate or --weight-decay"
    refused("pretrain", text_file, "--out", tmp_path / "r", *SMALL, *wild, saying=told)
    model, _ = checkpoint.load(tmp_path / "r")
    assert all(numpy.isfinite(p.data).all() for p in model.parameters().values())


def test_schedule_rises_and_falls():
    values = [schedule(x / 100, 0.1, 0.2) for x in range(101)]
    assert values[0] == 0
    assert values[10] == 1
    assert abs(values[100] - 0.2) < 1e-12
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)


def test_clipping_bounds_the_norm():
    assert clip_scale(0.5, 1.0) == 1.0
    assert abs(clip_scale(4.0, 1.0) * 4.0 - 1.0) < 1e-5
    assert clip_scale(4.0, 0.0) == 1.0


def test_decay_pulls_on_matrices_only():
    model = Transformer(ModelConfig(11, 1, 2, 2, 8, 16, 8))
    before = {name: p.data.copy() for name, p in model.parameters().items()}
    optimizer = AdamW(model.parameters(), weight_decay=0.5)
    for p in model.parameters().values():
        p.grad = numpy.zeros_like(p.data)
    optimizer.step(0.1)
    for name, p in model.parameters().items():
        factor = 0.95 if p.ndim > 1 else 1.0
        assert numpy.allclose(p.data, before[name] * factor, atol=1e-7), name


def test_memory_that_will_not_suffice_names_what_would_fit(monkeypatch):
    model = Transformer(ModelConfig(300, 2, 2, 2, 32, 64, 128))
    config = TrainConfig(batch_size=64, block_size=128)
    n = model.n_parameters()
    stage = SimpleNamespace(model=model, config=config, memory=lambda: (128, 0, 0))
    fits = memory.needed(model.config, n, 16, 128)
    monkeypatch.setattr(memory, "available", lambda: fits + 1000)
    with pytest.raises(InputError) as raised:
        memory.check(stage)
    ways = "--batch-size 16 --accumulate 4 or --recompute --batch-size 16 --accumulate 4 would fit"
    assert ways in str(raised.value)
    fits = memory.needed(model.config, n, 64, 128, recompute=True)
    with pytest.raises(InputError, match="or --recompute would fit"):
        memory.check(stage)
    config.recompute = True
    memory.check(stage)
    monkeypatch.setattr(memory, "available", lambda: 10**6)
    with pytest.raises(InputError, match="use a smaller model"):
        memory.check(stage)
    stage.config = PretrainConfig(block_size=128, max_steps=1)
    with pytest.raises(InputError, match="use a smaller --n-embd"):
        memory.check(stage)


def test_what_a_container_may_still_take(tmp_path, monkeypatch):
    """Its page cache is given back before a process dies: it does not count as taken."""
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    free = SimpleNamespace(available=8000 * 1024)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)
    assert memory.available() == 8000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4000000\n")
    (group / "memory.stat").write_text("anon 3500000\ninactive_file 300000\nactive_file 200000\n")
    assert memory.available() == 1_500_000
    (group / "memory.max").write_text("max\n")
    assert memory.available() == 8000 * 1024


def gradients(model, recompute: bool) -> dict:
    """Of two batches, the second of which has documents."""
    model.recompute = recompute
    rng = numpy.random.default_rng(0)
    for start in (None, numpy.repeat([[0] * 20 + [20] * 20], 3, 0).astype("int32")):
        model.loss(*rng.integers(0, 61, (2, 3, 40)), start).mean().backward()
    made = {name: p.grad for name, p in model.parameters().items()}
    for p in model.parameters().values():
        p.grad = None
    return made


@pytest.mark.parametrize("where", ["cpu", "reference"])
def test_gradients_of_recomputed_blocks_are_the_same_bits(model, where):
    backend.use(where)
    expected, found = gradients(model, False), gradients(model, True)
    assert all(found[name].tobytes() == g.tobytes() for name, g in expected.items())


PEAK = """
import re, sys
import numpy, tinylm
from tinylm import memory
from tinylm.bench import training_step
from tinylm.optim import AdamW

recompute = sys.argv[2] == "recompute"
c = tinylm.ModelConfig(300, 8, 4, 4, 256, block_size=256, architecture=sys.argv[1])
model = tinylm.Transformer(c)
model.recompute = recompute
ids = numpy.zeros((8, 257), "int64")
training_step(model, AdamW(model.parameters()), ids[:, :-1], ids[:, 1:], 1e-3)
status = open("/proc/self/status").read()  # getrusage would begin with the peak of our parent
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]))
print(memory.needed(c, model.n_parameters(), 8, 256, recompute))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_memory_is_foreseen_with_and_without_recomputing(architecture, tmp_path):
    measured = []
    for way in ("keep", "recompute"):
        done = python(PEAK, architecture, way, cwd=tmp_path)
        peak, foreseen = map(int, done.stdout.split())
        assert peak < foreseen < peak + memory.BASE
        measured.append(peak)
    assert measured[1] < 0.75 * measured[0]


WHOLE_RUN = """
import re, sys
from tinylm import cli, memory

needed, foreseen = memory.needed, []
memory.needed = lambda *about: foreseen.append(needed(*about)) or foreseen[-1]
assert cli.run(sys.argv[1:]) == 0
status = open("/proc/self/status").read()
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]), *foreseen)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
def test_memory_is_foreseen_for_xz_too(text_file, tmp_path):
    run = ["pretrain", text_file, "--out", tmp_path / "run", *SMALL, "--max-steps", "1"]
    done = python(WHOLE_RUN, *run, cwd=tmp_path)
    peak, foreseen = map(int, done.stdout.splitlines()[-1].split())
    assert peak < foreseen < peak + memory.BASE
