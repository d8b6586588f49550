"""Everything above the kernels, on arrays that are not NumPy's: `--backend cuda`, emulated.

Whatever forgets that a GPU's memory is another memory fails here, on any machine.
"""

import json
import sys

import device_arrays
import numpy
import pytest
from commands import SMALL, metrics, weights, write_rows

import tinylm
from tinylm import backend, memory, selfcheck, train
from tinylm.checkpoint import Checkpoint
from tinylm.cli import run
from tinylm.estimators import surrogate
from tinylm.generate import beam_search
from tinylm.kernels.cases import OPS
from tinylm.model import ModelConfig, Transformer
from tinylm.optim import AdamW, clip_scale
from tinylm.stages.pretrain import Pretrain
from tinylm.tensor import Tensor
from tinylm.train import Guard

FEW = ["--max-steps", 2, "--batch-size", 2, "--eval-every", 2, "--learning-rate", 1e-3]
SAID = [{"prompt": "the cat?", "completion": "a bird", "accepted": ["a bird"]}] * 8
JUDGED = [{"prompt": "the cat?", "chosen": "a bird", "rejected": f"{n}"} for n in range(12)]


def command(*arguments) -> None:
    assert run([*map(str, arguments)]) == 0


def all_stages(folder, text, backend, dtype) -> list[dict]:
    """Pre-train, fine-tune, learn from preferences and a judge; -> the rows of their metrics."""
    rows = write_rows(folder / "rows.jsonl", SAID)
    pairs = write_rows(folder / "pairs.jsonl", JUDGED)
    common = ["--backend", backend, "--dtype", dtype]
    base, sft, better = (folder / backend / name for name in ("base", "sft", "better"))
    shape = ["--block-size", 48, "--objective", "mixed", "--optimizer", "muon", "--accumulate", 2]
    command("pretrain", text, "--out", base, *SMALL, *FEW, *shape, *common)
    command("sft", base, "--data", rows, "--out", sft, *FEW, *common, "--held-out", 0.2)
    judged = ["--answers", 2, "--max-new-tokens", 5, "--batch-size", 4, "--held-out", 0]
    scores, dpo = folder / backend / "scores", folder / backend / "dpo"
    command("reward", sft, "--data", pairs, "--out", scores, *FEW, *common)
    judged += ["--judge", "reward-model", "--reward-model", scores]
    command("feedback", sft, "--prompts", rows, "--out", better, *FEW, *common, *judged)
    command("dpo", sft, "--data", pairs, "--out", dpo, *FEW, *common)
    return [row for stage in (base, sft, scores, better, dpo) for row in metrics(stage)]


@pytest.fixture(scope="module")
def text(prose, tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "prose.txt"
    path.write_text(prose[:6000])
    return path


def test_every_stage_learns_what_it_learns_on_the_cpu(cuda, text, tmp_path, capsys):
    found = all_stages(tmp_path, text, "cuda", "float32")
    assert backend.name == "cuda"
    said = [line for line in capsys.readouterr().err.splitlines() if "CUDA graph" in line]
    assert [line.split(":")[0] for line in said] == [
        "pretrain with muon", "reward with adamw", "feedback with adamw", "dpo with adamw",
    ]  # fmt: skip
    base, here = tmp_path / "cuda" / "base", ["--backend", "cuda"]
    command("generate", base, "the cat", "--max-new-tokens", 50, *here, "--seed", 1)
    command("fill", base, "the ___ sang", "--n", 2, *here)
    command("info", base, *here)
    command("report", base, *here)
    command("eval", base, *here)
    command("pretrain", text, "--out", base, "--resume", "--max-steps", 3, *here)

    expected = all_stages(tmp_path, text, "cpu", "float32")
    assert len(found) == len(expected)
    for row, other in zip(found, expected):
        for key in {"loss", "grad_norm", "bits_per_byte", "reward"} & {k for k in row if row[k]}:
            assert row[key] == pytest.approx(other[key], rel=1e-3), (key, row)


def test_the_feedback_loss_is_that_of_the_cpu(config, cuda):
    rng = numpy.random.default_rng(0)
    tokens, targets = rng.integers(0, 61, (2, 4, 20))
    targets[:, :10] = -1
    old = numpy.where(targets >= 0, -rng.uniform(3, 5, (4, 20)), 0).astype("float32")
    found = []
    for name in ("cuda", "cpu"):
        tinylm.use(name)
        model = Transformer(config, 1)
        nll = model.loss(tokens, targets, even=False)
        advantages = backend.asarray(numpy.array([[1.0], [-1.0], [0.5], [0.0]]))
        surrogate(nll, backend.asarray(old), advantages).mean().backward()
        found.append(backend.to_numpy(model.head_weight.grad))
    assert numpy.linalg.norm(found[0] - found[1]) <= 1e-5 * numpy.linalg.norm(found[1]) > 0


def test_both_shapes_compute_what_they_compute_on_the_cpu(config, cuda):
    rng = numpy.random.default_rng(0)
    tokens, targets = rng.integers(0, 61, (2, 3, 40))
    start = numpy.repeat([[0] * 20 + [20] * 20], 3, 0).astype("int32")
    found = {}
    for name in ("cuda", "cpu"):
        tinylm.use(name)
        model = Transformer(config, 1)
        loss = model.loss(tokens, targets, start)
        loss.mean().backward()
        grads = {n: backend.to_numpy(p.grad) for n, p in model.parameters().items()}
        with tinylm.no_grad():
            logits = backend.to_numpy(model(tokens[:1]).data)
        found[name] = grads | {"loss": backend.to_numpy(loss.data), "logits": logits}
        beam_search(model, [1, 2, 3], 3, 2, [1])
    for name, expected in found["cpu"].items():
        scale = numpy.linalg.norm(expected)
        assert numpy.linalg.norm(found["cuda"][name] - expected) <= 1e-5 * scale, name


def test_a_token_out_of_range_is_told_when_the_device_is_waited_for(config, cuda):
    model = Transformer(config, 1)
    loss = model.loss([[1, 99]], [[2, 2]])
    with pytest.raises(ValueError, match=r"\[embedding_forward\] tokens: .* \[0, 61\), got 99"):
        backend.to_numpy(loss.data)


@pytest.mark.parametrize("scale", [1, 0.3])
def test_the_loss_reads_nothing_back(config, cuda, scale, monkeypatch):
    """Forward and backward only ask; what they ask for is what the CPU computes."""
    rng = numpy.random.default_rng(0)
    tokens, targets = rng.integers(0, 61, (2, 3, 40))
    targets[:, ::3] = -1
    found = []
    for name in ("cuda", "cpu"):
        tinylm.use(name)
        model = Transformer(config, 1)
        with device_arrays.no_reads():
            loss = model.loss(tokens, targets)
            loss.backward(backend.xp.full(loss.shape, scale / (targets >= 0).sum(), "float32"))
        found.append(backend.to_numpy(model.head_weight.grad))
    assert numpy.linalg.norm(found[0] - found[1]) <= 1e-5 * numpy.linalg.norm(found[1])
    with device_arrays.no_reads(), pytest.raises(RuntimeError, match="read"):
        float(Tensor(device_arrays.asarray([1.0])).data.sum())


def test_an_uneven_gradient_is_told_when_the_device_is_waited_for(config, cuda):
    model, ids = Transformer(config, 1), numpy.arange(6).reshape(1, 6)
    for weight, wrong in ((0.0, False), (2.0, True)):
        weights = numpy.ones((1, 6), "float32")
        weights[0, 3] = weight
        targets = numpy.where(weights == 0, -1, ids)  # uneven only where a target counts
        model.loss(ids, targets).backward(backend.asarray(weights))
        if wrong:
            with pytest.raises(ValueError, match=r"dloss: expected the same .*even=False"):
                cuda.settle()
        cuda.settle()


def test_a_device_judges_and_updates_as_the_host_would(cuda):
    """The same verdicts, running mean and bits; of more than one piece, and of one without grad."""
    rng, shapes = numpy.random.default_rng(0), [(9,), (200, 101), (3, 7), (5,)]
    made = []
    for _ in range(2):
        leaves = [Tensor(backend.asarray(numpy.ones(s, "float32")), True) for s in shapes]
        made.append(AdamW({str(i): leaf for i, leaf in enumerate(leaves)}, weight_decay=0.3))
    (unasked, asked), guard, verdicts = made, Guard(), []
    rate = backend.asarray(numpy.float32([0.01]))
    for i in range(70):
        size = 40.0 if i in (55, 62) else numpy.inf if i == 58 else 1 + 0.3 * numpy.sin(i)
        loss = backend.asarray(numpy.array(numpy.nan if i == 60 else 1.5))
        for a, b in list(zip(unasked.parameters.values(), asked.parameters.values()))[:-1]:
            grad = numpy.float32(size * rng.standard_normal(a.shape))
            a.grad = b.grad = backend.asarray(grad)
        with device_arrays.no_reads():
            told = cuda.later(unasked.guarded_step(loss, rate, 100.0, Guard()))
        total, norm, updates = told()
        assert norm == pytest.approx(cuda.global_norm(asked.gradients()), rel=1e-12)
        verdicts.append(guard.reason(total, norm))
        if not verdicts[-1]:
            asked.step(0.01, clip_scale(norm, 100.0))
        assert updates == asked.steps
        assert unasked._guarded.guard.tolist() == [guard.mean, guard.seen, asked.steps]
        for name in ("m", "v"):
            for x, y in zip(getattr(unasked, name).values(), getattr(asked, name).values()):
                assert numpy.array_equal(x.get(), y.get())
        for p, q in zip(unasked.parameters.values(), asked.parameters.values()):
            assert numpy.array_equal(p.data.get(), q.data.get())
    assert [bool(v) for v in verdicts].count(True) == 4


def test_a_gradient_of_another_kind_is_refused_by_name(cuda):
    p = Tensor(backend.asarray(numpy.ones((3, 4), "float32")), True)
    optimizer, rate = AdamW({"p": p}), backend.asarray(numpy.zeros(1, "float32"))
    for grad, said in (
        (numpy.ones((3, 4)), "float32"),
        (numpy.ones((2, 6), "float32"), r"\(3, 4\)"),
    ):
        p.grad = backend.asarray(grad)
        with pytest.raises((TypeError, ValueError), match=rf"\[guarded_adamw\] grad: .*{said}"):
            optimizer.guarded_step(rate, rate, 0.0, Guard())


SHORT = [*SMALL, "--eval-every", 3, "--save-every", 100, "--learning-rate", 1e-3]


@pytest.fixture
def unread(monkeypatch):
    """Runs whose evaluations write no sample: on the emulator that takes longer than they do."""
    monkeypatch.setattr("tinylm.stages.pretrain.generate", lambda *_, **__: "")


@pytest.mark.usefixtures("unread")
def test_what_came_of_a_step_is_logged_one_step_late_and_in_order(cuda, text, tmp_path):
    whole, parts = (["pretrain", text, "--out", tmp_path / name] for name in ("whole", "parts"))
    here = [*SHORT, "--backend", "cuda"]
    command(*whole, *here, "--max-steps", 7)
    command(*parts, *here, "--max-steps", 4)
    command(*parts, *here, "--max-steps", 7, "--resume")
    rows = metrics(tmp_path / "whole")
    assert [(row["step"], row.get("event")) for row in rows] == [
        (1, None), (2, None), (3, None), (3, "eval"), (4, None), (5, None), (6, None), (6, "eval"),
        (7, None), (7, "final"),
    ]  # fmt: skip
    assert Checkpoint(tmp_path / "whole").state()["optimizer_steps"] == 7
    there = ["--out", tmp_path / "cpu", "--backend", "cpu"]
    command("pretrain", text, *there, *SHORT, "--max-steps", 7)
    for row, other in zip(rows, metrics(tmp_path / "cpu")):
        assert row.keys() == other.keys()
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    # the schedule of four steps is another one: only that nothing is lost or counted twice
    assert Checkpoint(tmp_path / "parts").state()["optimizer_steps"] == 7
    steps = [row["step"] for row in metrics(tmp_path / "parts") if "lr" in row]
    assert steps == list(range(1, 8))


@pytest.mark.usefixtures("unread")
def test_a_run_on_a_device_resumes_to_the_same_bits(cuda, text, tmp_path):
    here = ["pretrain", text, *SHORT, "--backend", "cuda", "--max-steps", 6, "--save-every", 3]
    command(*here, "--out", tmp_path / "whole")
    stop = train.Trainer.save

    def killed(trainer):
        stop(trainer)
        if trainer.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "save", killed)
        assert run([*map(str, here), "--out", str(tmp_path / "r")])
    command(*here, "--out", tmp_path / "r", "--resume")
    assert weights(tmp_path / "r") == weights(tmp_path / "whole")


@pytest.mark.usefixtures("unread")
def test_a_gradient_that_is_nan_is_refused_by_the_device_and_logged(cuda, text, tmp_path, capsys):
    arguments = ["pretrain", text, "--out", tmp_path / "r", *SHORT, "--max-steps", 12]
    run([*map(str, [*arguments, "--backend", "cuda", "--learning-rate", 1e12, "--clip", 0])])
    rows = [row for row in metrics(tmp_path / "r") if "lr" in row]
    skipped = [row for row in rows if row.get("event") == "skip"]
    assert skipped
    assert skipped[0]["reason"] == "loss or gradient not finite"
    assert Checkpoint(tmp_path / "r").state()["optimizer_steps"] == len(rows) - len(skipped)
    assert f"step {skipped[0]['step']}: update skipped" in capsys.readouterr().err
    model, _ = tinylm.load(tmp_path / "r")
    assert all(numpy.isfinite(p.data.get()).all() for p in model.parameters().values())


def test_a_token_out_of_range_stops_the_run_before_anything_is_learned(cuda, config):
    model = Transformer(config, 1)
    optimizer = AdamW(model.parameters())
    before = {name: p.data.get() for name, p in model.parameters().items()}
    loss = model.loss([[1, 99, 2]], [[2, 2, 2]])
    loss.backward(backend.xp.full(loss.shape, 1 / 3, "float32"))
    total, rate = loss.data.sum(dtype="float64"), backend.asarray(numpy.ones(1, "float32"))
    told = cuda.later(optimizer.guarded_step(total, rate, 0.0, Guard()))
    with pytest.raises(ValueError, match="got 99"):
        told()
    assert all(numpy.array_equal(before[k], p.data.get()) for k, p in model.parameters().items())


# ---- recorded steps ----------------------------------------------------------------------------


@pytest.fixture
def replays(cuda, monkeypatch):
    """The graphs that were replayed, one entry for each time."""
    found, replay = [], cuda.device.replay
    monkeypatch.setattr(cuda.device, "replay", lambda tape: (found.append(tape), replay(tape)))
    return found


@pytest.mark.parametrize(
    "more",
    [
        ["--objective", "mixed", "--accumulate", 2],  # so that the number of targets changes
        ["--document-separator", "moon", "--architecture", "gpt2", "--recompute"],
        ["--dtype", "bfloat16"],
    ],
    ids=lambda more: more[0],
)
@pytest.mark.usefixtures("unread")
def test_replayed_steps_are_the_bits_of_steps_that_were_asked_for(
    more, replays, text, tmp_path, monkeypatch
):
    here = ["pretrain", text, *SHORT, "--backend", "cuda", "--max-steps", 5, *more]
    command(*here, "--out", tmp_path / "replayed")
    assert len(replays) == 4  # the first step is asked for
    assert len({id(tape) for tape in replays}) == 1
    monkeypatch.setattr(Pretrain, "recordable", False)
    command(*here, "--out", tmp_path / "asked")
    assert len(replays) == 4
    assert weights(tmp_path / "replayed") == weights(tmp_path / "asked")
    found, expected = (metrics(tmp_path / name) for name in ("replayed", "asked"))
    for row, other in zip(found, expected, strict=True):
        assert row.get("loss") == other.get("loss")
        assert row.get("grad_norm") == other.get("grad_norm")


@pytest.mark.parametrize("what", ["a host read", "memory of the host is copied"])
@pytest.mark.usefixtures("unread")
def test_a_step_that_cannot_be_recorded_is_asked_for_and_that_is_said(
    what, replays, text, tmp_path, monkeypatch, capsys
):
    here = ["pretrain", text, *SHORT, "--backend", "cuda", "--max-steps", 4]
    command(*here, "--out", tmp_path / "usual")
    loss, n = Pretrain.loss, len(replays)

    def meddling(stage, batch):
        found = loss(stage, batch)
        if what == "a host read":
            assert found.data.sum().item() > 0
        else:
            found.data[0, 0] = backend.asarray(numpy.zeros(1))[0]
        return found

    monkeypatch.setattr(Pretrain, "loss", meddling)
    command(*here, "--out", tmp_path / "meddling")
    assert len(replays) == n
    said = " ".join(capsys.readouterr().err.split())
    assert f"no graph can be made: RuntimeError: {what}" in said
    if what == "a host read":
        assert weights(tmp_path / "usual") == weights(tmp_path / "meddling")


def test_what_is_recorded_is_done_later_and_with_memory_that_is_still_there(cuda):
    ones = device_arrays.asarray(numpy.ones(3, "float32"))
    lost = device_arrays.asarray(numpy.ones(3, "float32"))
    with device_arrays.recording() as tape:
        total = cuda.add(ones, lost) + 1
        total *= 2
    ones.fill(5)
    tape.play()
    assert total.tolist() == [14, 14, 14]
    tape.play()
    assert total.tolist() == [14, 14, 14]
    del lost
    with pytest.raises(RuntimeError, match="freed"):
        tape.play()


def test_bfloat16_is_the_default_there(cuda):
    assert backend.product_dtype("auto") == "bfloat16"
    backend.set_products("auto")
    assert cuda.products == "bfloat16"
    tinylm.use("cpu")
    assert backend.product_dtype("auto") == "float32"


def test_selfcheck_certifies_the_device(cuda, capsys, monkeypatch):
    monkeypatch.setattr(selfcheck, "OPS", {op: OPS[op] for op in ("adamw", "softmax")})
    assert run(["selfcheck", "--backend", "cuda", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert "cuda (emulator)" in found["backend"]


def test_memory_is_that_of_the_device(cuda):
    sys.modules["tinylm.kernels.cuda"].free_bytes = lambda: 123
    assert memory.available() == 123
    model = ModelConfig(50257, 12, 12, 12, 768, 3072, 1024, architecture="gpt2")
    assert 4e9 < memory.needed(model, 124_000_000, 4, 1024) < 8e9
