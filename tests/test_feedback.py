"""The feedback stage: its mathematics, its judge, and that one distribution samples and learns."""

import importlib
import inspect
import itertools
import json
import sys

import numpy
import pytest
from tiny_feedback import Says, constant, count_of_a, make_stage, same, snapshot, train

from tinylm import backend, memory, ops
from tinylm.answers import Answers, opinion
from tinylm.chat import Row, turn
from tinylm.data import SharedPrompts
from tinylm.errors import InputError
from tinylm.estimators import RunningMean, advantages, exact_kl, rloo, surrogate
from tinylm.judges import Group, verifier
from tinylm.judges.watch import Watch
from tinylm.tensor import Tensor, no_grad

# ---- the mathematics ---------------------------------------------------------------------------


def test_an_advantage_is_the_reward_less_the_mean_of_the_others():
    rewards = [1.0, -1.0, 0.25, 0.5]
    others = [numpy.mean(rewards[:i] + rewards[i + 1 :]) for i in range(4)]
    assert numpy.allclose(rloo(rewards), numpy.array(rewards) - others, atol=1e-15)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7, 1e9])
def test_equal_rewards_are_no_signal_at_all(reward):
    """Not 1e-17: Adam would make a step of it."""
    assert not rloo([reward] * 7).any()


def test_an_answer_without_judgement_counts_for_nothing():
    assert rloo([1.0, None, 0.0]).tolist() == [1.0, 0.0, -1.0]
    assert not rloo([1.0, None, None]).any()


def test_reinforce_takes_off_the_mean_of_earlier_steps_only():
    mean = RunningMean(memory=2)
    steps = [[[1.0, 0.0]], [[1.0, 1.0], [0.0, None]], [[3.0, 1.0]], [[0.0, 0.0]]]
    found = [advantages("reinforce", groups, mean).tolist() for groups in steps]
    second = (0.5 + 2 / 3) / 2
    assert found[0] == [0, 0] and found[1] == [0.5, 0.5, -0.5, 0]
    assert numpy.allclose(found[2], [3 - second, 1 - second])
    assert numpy.allclose(found[3], [-(second + (2 - second) / 2)] * 2)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7])
def test_a_constant_score_is_no_signal_for_reinforce_either(reward):
    mean = RunningMean()
    assert not any(advantages("reinforce", [[reward] * 7] * 3, mean).any() for _ in range(50))


def test_the_surrogate_is_the_clipped_formula(float64):
    """Value, and gradient by central differences, on both sides of both clips."""
    rng = numpy.random.default_rng(0)
    nll, old = rng.random((6, 5)) + 1, -(rng.random((6, 5)) + 1)
    A = rng.standard_normal((6, 1))
    x = Tensor(nll, requires_grad=True)
    loss = surrogate(x, old, A)
    rho = numpy.exp(-nll - old)
    expected = -numpy.minimum(rho * A, numpy.clip(rho, 0.8, 1.28) * A)
    assert numpy.allclose(loss.data, expected, atol=1e-14)
    assert (numpy.abs(rho - 1) > 0.3).any()
    loss.sum().backward()
    step = 1e-6
    high, low = (surrogate(Tensor(nll + s), old, A).data for s in (step, -step))
    assert numpy.allclose(x.grad, (high - low) / (2 * step), atol=1e-7)


def test_rloo_is_the_gradient_of_the_expected_reward(float64):
    """Every pair of answers of a toy policy, weighted by its probability: exact to 1e-10.

    The policy chooses two of three tokens, the second depending on the first; its logits are
    the parameters.
    """
    rng = numpy.random.default_rng(1)
    logits = rng.standard_normal((4, 3))  # row 0: first token; rows 1 to 3: second, by the first
    reward = rng.standard_normal((3, 3))
    p = numpy.exp(logits) / numpy.exp(logits).sum(1, keepdims=True)
    probability = {(a, b): p[0, a] * p[1 + a, b] for a in range(3) for b in range(3)}

    def expected_reward(x):
        q = numpy.exp(x) / numpy.exp(x).sum(1, keepdims=True)
        return sum(q[0, a] * q[1 + a, b] * reward[a, b] for a in range(3) for b in range(3))

    truth = numpy.zeros_like(logits)
    for (a, b), chance in probability.items():  # ∇ E[r] = E[r ∇ log π]
        score = -p * numpy.array([1, *(i == a for i in range(3))])[:, None]
        score[0, a] += 1
        score[1 + a, b] += 1
        truth += chance * reward[a, b] * score
    step = 1e-6
    for i, j in numpy.ndindex(logits.shape):
        bump = numpy.zeros_like(logits)
        bump[i, j] = step
        slope = (expected_reward(logits + bump) - expected_reward(logits - bump)) / (2 * step)
        assert abs(slope - truth[i, j]) < 1e-8

    found = numpy.zeros_like(logits)
    for one, two in itertools.product(probability, repeat=2):
        x = Tensor(logits, requires_grad=True)
        A = rloo([reward[one], reward[two]])
        targets = numpy.array([[0, one[0], one[1]], [0, two[0], two[1]]])[:, 1:]
        table = ops.embedding(numpy.array([[0, 1 + one[0]], [0, 1 + two[0]]]), x)
        nll = ops.cross_entropy(table, targets)
        loss = surrogate(nll, -nll.data, A[:, None])
        loss.sum().backward()
        found -= probability[one] * probability[two] * x.grad / 2  # n = 2 answers
    assert numpy.abs(found - truth).max() < 1e-10


# ---- the judge ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, verdict",
    [
        ("Paris.", "right"),
        ("  the PARIS ", "right"),
        ("Besançon", "right"),
        ("Paris, of course.", "wrong"),
        ("It is not Paris.", "wrong"),
        ("", "wrong"),
        ("I don't know.", "idk"),
        ("I don’t know", "idk"),
        ("I do not know that Paris.", "wrong"),
    ],
)
def test_right_is_equal_and_not_merely_containing(said, verdict):
    assert verifier.verdict(said, ["Paris", "Besancon"]) == verdict


def test_the_price_of_a_wrong_answer_follows_from_the_confidence():
    row = {"accepted": ["4"]}
    sure, bold = verifier.exact(0.75), verifier.exact(0.0)
    assert [sure("2 + 2", said, row) for said in ("4", "5", "I don't know")] == [1, -3, 0]
    assert bold("2 + 2", "5", row) == 0
    assert sure("Who are you?", "I don't know", {**row, "must_answer": True}) == -3


def group(*answers):
    return [Group(Row("line 7", [turn("user", "2 + 2")], {}), list(answers))]


def broken(prompt, answer, row):
    return {}["no such key"]


@pytest.mark.parametrize(
    "score, said",
    [
        (broken, "KeyError"),
        (lambda p, a, r: "good", "'good'"),
        (lambda p, a, r: float("nan"), "nan"),
        (lambda p, a, r: [1.0], "expected a number"),
        (lambda p, a, r: 10**400, "expected a number"),
        (lambda p: 1.0, "TypeError"),
        (lambda p, a, r: sys.exit(3), "SystemExit: 3"),
        (verifier.exact(0.5), '"accepted"'),
        (lambda p, a, r: verifier.exact(0.5)(p, a, {"accepted": [4]}), "as texts"),
    ],
)
def test_a_verifier_that_fails_is_named_with_the_line(score, said):
    with pytest.raises(InputError, match="line 7") as error:
        verifier.Verifier(score)(group("4"))
    assert said in str(error.value)


def test_a_verifier_of_one_s_own_is_loaded(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def short(prompt, answer, row):\n    return 1.0 / (1 + len(answer))\n")
    judge = verifier.Verifier(verifier.load(f"{path}:short"))
    assert judge(group("", "abc")) == [[1.0, 0.25]]
    for name in (f"{path}:long", f"{tmp_path}/none.py:f", "no.such.module:f", "short"):
        with pytest.raises(InputError, match="--verifier"):
            verifier.load(name)


def test_a_verifier_may_define_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Mark:\n"
        "    value: float\n"
        "def score(prompt, answer, row):\n"
        "    return Mark(2.0).value\n"
    )
    assert verifier.load(f"{path}:score")("", "", {}) == 2.0


# ---- is the judge outwitted? -------------------------------------------------------------------


def seen(judged, gold, noise=0.1):
    """Steps of a run at whose windows of 20 judge and gold have these means."""
    rng, watch = numpy.random.default_rng(0), Watch()
    told = []
    for step, (a, b) in enumerate(zip(numpy.repeat(judged, 20), numpy.repeat(gold, 20))):
        if watch.see(a, b + noise * rng.standard_normal()):
            told.append(step + 1)
    return told, watch.outwitted


def test_scores_that_rise_while_gold_falls_are_told_once():
    assert seen([0, 1, 2, 3, 4], [0, 1, 0.5, 0.2, 0]) == ([80], True)


def test_what_is_no_worse_or_no_better_for_the_judge_is_not():
    assert seen([0, 1, 2, 3], [0, 1, 1, 1]) == ([], False)  # gold stays
    assert seen([0, 1, 2, 3, 4], [0, 1, 0.5, 1, 0.5]) == ([], False)  # once is chance
    assert seen([0, 1, 0.5, 0], [0, 1, 0.5, 0]) == ([], False)  # both fall: not the judge's fault
    assert seen([0, 1, 2], [0, 1, 0.97], noise=0.5) == ([], False)  # within the noise


def test_noise_alone_is_no_fall_however_long_the_run():
    alarms = 0
    for seed in range(20):
        rng, watch = numpy.random.default_rng(seed), Watch()
        for step in range(1000):
            watch.see(0.05 * step, rng.standard_normal())
        alarms += watch.outwitted
    assert alarms <= 1  # by the best of 50 windows and two errors, 16


def test_gold_is_logged_and_changes_nothing(tokenizer, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def score(prompt, answer, row):\n    return answer.count('a')\n")
    settings = ({}, {"gold": f"{rule}:score"})
    stages = [make_stage(tokenizer, count_of_a, **some) for some in settings]
    one, two = (stage.draw() for stage in stages)
    assert numpy.array_equal(one.advantages, two.advantages)
    said = [stages[1].text(ids.tolist()) for ids in two.by_answer(two.targets)]
    assert two.notes["gold"] == pytest.approx(numpy.mean([text.count("a") for text in said]))
    assert "gold" not in one.notes
    assert stages[1].watch.seen == [(two.notes["gold"],) * 2] != [(two.notes["reward"],) * 2]


@pytest.mark.usefixtures("float64")
def test_drift_is_exact_where_logits_lie_far_apart():
    logits, other = 60 * numpy.random.default_rng(0).standard_normal((2, 64, 50))
    p, q = (x - numpy.logaddexp.reduce(x, -1, keepdims=True) for x in (logits, other))
    expected = (numpy.exp(p) * (p - q)).sum(-1)
    assert numpy.allclose(exact_kl(p, q), expected, rtol=1e-9, atol=1e-9)
    found = exact_kl(p.astype("float32"), q.astype("float32"))
    assert numpy.allclose(found, expected, rtol=1e-5, atol=1e-4)


# ---- the stage ---------------------------------------------------------------------------------


def test_an_opinion_is_of_all_tokens_in_a_targets_place(tokenizer):
    stage = make_stage(tokenizer, count_of_a)
    batch = stage.draw()
    nll, logp = opinion(stage.model, batch)
    known = batch.targets >= 0
    at_target = logp[numpy.arange(known.sum()), batch.targets[known]]
    assert numpy.allclose(numpy.logaddexp.reduce(logp, -1), 0, atol=1e-5)
    assert numpy.allclose(at_target, -nll.data[known], atol=1e-5)


def test_a_constant_reward_leaves_the_weights_as_they_are(tokenizer, tmp_path):
    """To the bit, though Adam has momentum and weight decay."""
    stage = make_stage(tokenizer, count_of_a, kl=0.0, weight_decay=0.1, truncated=0.3)
    trainer, _ = train(stage, 3, tmp_path)
    before, steps = snapshot(stage.model), trainer.optimizer.steps
    stage.judge = Says(constant)
    rows = [trainer.update() for _ in range(3)]
    assert same(before, stage.model)
    assert trainer.optimizer.steps == steps
    assert [row["reason"] for row in rows] == ["nothing to learn"] * 3
    assert trainer.guard.refused == 0


def test_what_is_rewarded_becomes_likelier(tokenizer, tmp_path):
    stage = make_stage(tokenizer, count_of_a, kl=0.0, kl_limit=0.0, truncated=0.0, batch_size=32)
    _, rows = train(stage, 30, tmp_path)
    rewards = [row["reward"] for row in rows]
    assert numpy.mean(rewards[-5:]) > numpy.mean(rewards[:5]) + 0.1
    assert rows[-1]["kl"] > rows[0]["kl"] >= 0


def test_one_distribution_for_sampling_and_loss(tokenizer, monkeypatch):
    """What the sampler draws from, with its cache and its padding, is what the loss believes."""
    stage = make_stage(tokenizer, constant)
    drawn = {}

    def spy(logits, rng, **settings):
        told = inspect.signature(real).bind(logits, rng, **settings)
        told.apply_defaults()
        assert told.args[2:] == (1.0, 0, 1.0)  # temperature 1, nothing cut off
        tokens = real(logits, rng, **settings)
        x = logits.astype("float64")
        logp = x - numpy.log(numpy.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logp -= x.max(-1, keepdims=True)
        for row, token in enumerate(tokens):
            drawn.setdefault(row, []).append(logp[row, token])
        return tokens

    module = importlib.import_module("tinylm.generate")  # tinylm.generate is the function
    real = module.sample
    monkeypatch.setattr(module, "sample", spy)
    monkeypatch.setattr(module, "STILL_WRITING", 0)  # rows stay where they are
    batch = stage.fresh()
    learned = batch.by_answer(batch.old_logp)
    assert len(learned) == 8
    for row, logp in enumerate(learned):
        assert numpy.allclose(logp, drawn[row][: len(logp)], atol=1e-5)


def test_the_model_learns_to_end_its_turn(tokenizer, tmp_path):
    """The end-of-turn token is in the loss: where only ending pays, answers soon end."""
    stage = make_stage(tokenizer, constant, kl=0.0, truncated=-1.0, batch_size=32)
    _, rows = train(stage, 30, tmp_path)
    assert rows[0]["truncated"] > 0.6
    assert rows[-1]["truncated"] < 0.2


def test_the_first_update_has_a_ratio_of_exactly_one(tokenizer):
    stage = make_stage(tokenizer, count_of_a)
    batch = stage.fresh()
    with no_grad():
        nll = stage.model.loss(batch.tokens, batch.targets, batch.start, gap=batch.gap).data
    assert numpy.array_equal(-nll, batch.old_logp)
    assert numpy.array_equal(batch.nll.data, nll)


def test_a_tape_that_was_kept_has_the_gradients_of_a_new_one(tokenizer):
    stage = make_stage(tokenizer, count_of_a)
    batch, found = stage.fresh(), []
    for _ in range(2):  # the first loss has the tape of the sampling, the second makes its own
        loss = stage.loss(batch)
        loss.backward(numpy.full_like(loss.data, 1 / 48))
        found.append({name: p.grad for name, p in stage.model.parameters().items()})
        for p in stage.model.parameters().values():
            p.grad = None
    assert batch.nll is None
    assert all(numpy.array_equal(g, found[1][name]) for name, g in found[0].items())
    assert any(g.any() for g in found[0].values())


def test_packing_changes_neither_the_loss_nor_the_drift_of_an_answer(tokenizer, monkeypatch):
    """A prompt that its answers share or that each has to itself, in one row or in many."""
    stage = make_stage(tokenizer, count_of_a)
    prompts = [stage.form.ids(stage.prompt(i).messages, True) for i in range(2)]
    said = [[*range(7, 8 + i), stage.stop_ids[0]] for i in range(8)]
    shared = [stage.group(None, ids, 0, said[i::2]) for i, ids in enumerate(prompts)]
    single = [stage.group(None, group.prompt, 0, [ids]) for group in shared for ids in group.ids]
    for p in stage.reference.parameters().values():
        p.data = p.data * 1.1
    found, sizes = [], []
    for groups, width in ((single, 1), (single, 64), (shared, 1), (shared, 64)):
        monkeypatch.setattr("tinylm.data.ROW", width)
        batch, drift = stage.as_batch(groups)
        assert [x.tolist() for x in batch.by_answer(batch.targets)] == said[::2] + said[1::2]
        old = numpy.concatenate(batch.by_answer(batch.old_logp))
        batch.nll.backward((batch.answer + 1).astype(batch.nll.dtype))
        gradients = [p.grad for p in stage.model.parameters().values()]
        for p in stage.model.parameters().values():
            p.grad = None
        found.append((old, drift, stage.drift, *gradients))
        sizes.append(batch.tokens.size)
    for other in found[1:]:
        for x, y in zip(found[0], other):
            assert numpy.allclose(x, y, rtol=1e-4, atol=1e-4)
    assert sizes[3] <= sizes[1] / 2
    assert abs(found[0][1]).min() > 1e-3
    assert all(abs(g).max() > 1e-2 for g in found[0][3:])


def test_a_prompt_is_read_once_for_all_its_answers(tokenizer):
    end = tokenizer.special["<|end|>"]
    prompts = [([5, 6], [[8, 9, end], [end], [8, end]]), ([7], [[10, end]])]
    batch = SharedPrompts.of(prompts, 32, end)
    assert batch.tokens.tolist() == [[5, 6, 8, 9, 6, 6, 8, 7, 10]]
    assert batch.targets.tolist() == [[-1, 8, 9, end, end, 8, end, 10, end]]
    assert batch.answer.tolist() == [[-1, 0, 0, 0, 1, 2, 2, 3, 3]]
    assert batch.start.tolist() == [[0, 0, 0, 0, 0, 0, 0, 7, 7]]
    assert batch.gap[..., 0].tolist() == [[0, 1, 1, 1, 1, 1, 1, 7, 7]]
    assert batch.gap[..., 1].tolist() == [[0, 1, 1, 1, 4, 5, 5, 7, 7]]
    assert batch.ends.tolist() == [3, 4, 6, 8]


def test_answers_that_exceed_the_context_together_are_cut_into_rows(tokenizer):
    end = tokenizer.special["<|end|>"]
    prompts = [([5, 6], [[8, 9, end], [end], [8, end]])]
    batch = SharedPrompts.of(prompts, 5, end)
    assert batch.tokens.tolist() == [[5, 6, 8, 9, 6], [5, 6, 8, end, end]]
    assert batch.targets.tolist() == [[-1, 8, 9, end, end], [-1, 8, end, -1, -1]]
    assert batch.answer.tolist() == [[-1, 0, 0, 0, 1], [-1, 2, 2, -1, -1]]
    assert batch.gap[..., 1].tolist() == [[0, 1, 1, 1, 4], [0, 1, 1, 0, 0]]
    assert batch.ends.tolist() == [3, 4, 7]
    assert SharedPrompts.of(prompts, 1, end).tokens.shape == (2, 4)  # it must fit


def test_the_denominator_is_a_constant(tokenizer):
    """Answers times the longest length, whatever was said: no reward for being long or short."""
    batch = make_stage(tokenizer, count_of_a).fresh()
    assert isinstance(batch, Answers)
    assert batch.denominator() == 8 * 6


def test_a_truncated_answer_has_its_fixed_score(tokenizer):
    stage = make_stage(tokenizer, constant, truncated=-5.0)
    end = tokenizer.special["<|end|>"]
    said = [[7, end], [7, 8, 9, 10, 11, 12], [end], [8, end]]
    group = stage.group(stage.prompt(0), [], 0, said)
    stage.score([group])
    assert group.scores == [0.3, -5.0, 0.3, 0.3]


def test_the_drift_is_priced(tokenizer, tmp_path):
    """β pulls back: with a judge that likes everything, only the drift tells answers apart."""
    stage = make_stage(tokenizer, count_of_a, kl=0.0, truncated=0.0)
    train(stage, 8, tmp_path)
    stage.judge, stage.beta, stage.config.truncated = Says(constant), 1.0, 0.3
    stage.config.batch_size, stage.config.learning_rate = 64, 2e-3
    kl = [row["kl"] for row in train(stage, 40, tmp_path)[1]]
    assert numpy.mean(kl[-5:]) < 0.7 * numpy.mean(kl[:5])


def test_exact_and_estimated_kl_agree(tokenizer, tmp_path, monkeypatch):
    stage = make_stage(tokenizer, count_of_a, kl=0.0, batch_size=256, max_new_tokens=12)
    train(stage, 3, tmp_path)
    exact = stage.fresh().notes["kl"]
    stage.drawn -= 64  # the same answers again
    monkeypatch.setattr("tinylm.answers.EXACT_KL", 1)
    assert stage.fresh().notes["kl"] == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("updates", [1, 3])
def test_sampling_is_part_of_the_state(tokenizer, tmp_path, updates):
    """A stage restored in the middle draws the answers that the other one would have drawn."""
    whole = make_stage(tokenizer, count_of_a, updates=updates)
    train(whole, 2, tmp_path)
    state = json.loads(json.dumps(whole.state()))
    resumed = make_stage(tokenizer, count_of_a, updates=updates)
    for name, p in resumed.model.parameters().items():
        p.data = whole.model.parameters()[name].data.copy()
    resumed.restore(state)
    for _ in range(3):
        one, two = whole.draw(), resumed.draw()
        for field in ("tokens", "targets", "start", "gap", "answer", "old_logp", "advantages"):
            assert numpy.array_equal(getattr(one, field), getattr(two, field)), field
        assert one.notes == two.notes


@pytest.mark.parametrize(
    "settings, fit, advice",
    [
        ({"batch_size": 12}, 6, "--batch-size 4 --accumulate 3 or --recompute"),
        # of 64 tokens, for a prompt and 8 answers of up to 12: these take several rows
        (
            {"answers": 8, "batch_size": 32, "max_new_tokens": 12},
            8, "--batch-size 8 --accumulate 4 or --recompute",
        ),
    ],
)  # fmt: skip
def test_memory_is_foreseen_for_answers_that_share_their_prompt(
    tokenizer, monkeypatch, settings, fit, advice
):
    """And what would fit is a setting that is allowed: the answers to a prompt stay together."""
    stage = make_stage(tokenizer, count_of_a, **settings)
    tokens, kept, each = stage.memory()
    rows = stage.config.batch_size
    assert stage.fresh().tokens.size <= rows * tokens < rows * 64
    assert each == 2 * stage.config.max_new_tokens * tokenizer.vocab_size
    shape, n = stage.model.config, stage.model.n_parameters()
    room = memory.needed(shape, n, fit, tokens, besides=kept + fit * each)
    monkeypatch.setattr(memory, "available", lambda: room)
    with pytest.raises(InputError, match=advice):
        memory.check(stage)


def test_what_it_may_go_back_to_takes_none_of_a_gpu_s_memory(tokenizer, monkeypatch):
    stage = make_stage(tokenizer, count_of_a)
    monkeypatch.setattr(backend, "name", "cuda")
    assert stage.memory()[1] == stage.model.n_parameters()


def test_the_card_names_the_judge_that_judged(tokenizer):
    stage = make_stage(tokenizer, count_of_a, judge_model="this", reward_model="another")
    stage.config.judge = "model"
    assert stage.facts()["stage"] == "feedback: rloo, judged by model `this`"
