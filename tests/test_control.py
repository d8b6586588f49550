"""Feedback survives what goes wrong in it: each row of this list is provoked.

NaN, drift beyond its limit, a judge that is silent, answers that all score alike, empty answers.
"""

import json

import numpy
import pytest
from tiny_feedback import begin, constant, count_of_a, make_stage, same, snapshot, train

from tinylm.chat import turn
from tinylm.checkpoint import Checkpoint
from tinylm.errors import InputError
from tinylm.estimators import cause
from tinylm.judges import Judge
from tinylm.train import read_metrics


def lively(groups):
    """Tells the answers to every prompt apart."""
    return [[i + a.count("a") for i, a in enumerate(group.answers)] for group in groups]


def poison(model):
    """One weight becomes NaN, as after an update that overflowed."""
    p = model.parameters()["model.layers.0.mlp.up_proj.weight"]
    p.data[0, 0] = numpy.nan


# ---- NaN ---------------------------------------------------------------------------------------


def test_after_nan_it_goes_on_from_good_weights_at_half_the_rate(tokenizer, tmp_path):
    stage = make_stage(tokenizer, lively, kl=0.0, truncated=0.0)
    trainer, _ = train(stage, 10, tmp_path)
    good = snapshot(stage.model)  # with these the eleventh step begins, and finds them in order
    train_more(trainer, 4)
    poison(stage.model)
    row = trainer.update()
    assert row["event"] == "skip"
    assert row["reason"] == "loss or gradient not finite"
    assert row["loss"] is None
    json.dumps(row, allow_nan=False)
    assert same(good, stage.model)
    after = trainer.update()
    assert "event" not in after
    assert numpy.isfinite(after["loss"])
    assert after["lr"] == pytest.approx(row["lr"] / 2, rel=0.05)


def train_more(trainer, steps):
    return [trainer.update() for _ in range(steps)]


def test_a_gradient_that_is_nan_is_not_followed_either(tokenizer, tmp_path, monkeypatch):
    stage = make_stage(tokenizer, lively, kl=0.0, truncated=0.0)
    trainer, _ = train(stage, 1, tmp_path)
    monkeypatch.setattr("tinylm.backend.kernels.global_norm", lambda gradients: float("nan"))
    assert trainer.update()["grad_norm"] is None
    assert all(numpy.isfinite(p.data).all() for p in stage.model.parameters().values())


def test_the_third_nan_since_the_same_weights_ends_the_run(tokenizer, tmp_path):
    stage = make_stage(tokenizer, lively, kl=0.0, truncated=0.0)
    trainer, _ = train(stage, 3, tmp_path)
    for _ in range(2):
        poison(stage.model)
        trainer.update()
    assert trainer.guard.rate == 0.25
    poison(stage.model)
    with pytest.raises(InputError, match="--learning-rate"):
        trainer.update()
    assert all(numpy.isfinite(p.data).all() for p in stage.model.parameters().values())


# ---- drift -------------------------------------------------------------------------------------


def test_beyond_the_limit_it_goes_back_and_drift_costs_twice(tokenizer, tmp_path):
    stage = make_stage(tokenizer, lively, kl=0.05, truncated=0.0, kl_limit=0.2)
    trainer = begin(stage, tmp_path)
    before, rows = snapshot(stage.model), []
    while not (rows and "drift" in rows[-1].get("reason", "")):
        rows.append(trainer.update())
        assert trainer.step < 10  # so that what is remembered is the beginning
    assert rows[-1]["kl"] > 0.2
    assert same(before, stage.model)
    assert stage.beta == 0.1
    assert trainer.update()["kl"] < 1e-6


def test_drift_was_free_and_now_costs_something(tokenizer):
    stage = make_stage(tokenizer, lively, kl=0.0)
    stage.recover("drift of 3")
    assert stage.beta == 0.01


def test_a_run_that_always_drifts_stops_itself(tokenizer, tmp_path):
    stage = make_stage(tokenizer, lively, kl=0.0, truncated=0.0, kl_limit=0.05)
    with pytest.raises(InputError, match=r"3rd time.*--kl"):
        train(stage, 60, tmp_path)


@pytest.mark.parametrize("accident", ["nan", "drift"])
def test_what_it_goes_back_to_survives_a_resume(tokenizer, tmp_path, accident):
    """The same bits, though the run is interrupted between the good weights and the accident."""

    settings = {"kl": 0.0, "truncated": 0.0, "save_every": 3, "updates": 2}

    def go_on(trainer):
        if accident == "nan":
            poison(trainer.stage.model)
        else:
            trainer.stage.config.kl_limit = 1e-9
        trainer.stage.left = 0
        assert trainer.update()["event"] == "skip"
        trainer.stage.config.kl_limit = 0.0
        train_more(trainer, 3)
        return trainer

    one, two = (
        train(make_stage(tokenizer, lively, **settings), 13, tmp_path / name)[0]
        for name in ("one", "two")
    )
    go_on(one)
    two.save()
    resumed = begin(make_stage(tokenizer, lively, **settings), tmp_path / "two")
    resumed.restore()
    go_on(resumed)
    assert same(snapshot(one.stage.model), resumed.stage.model)
    assert (one.stage.beta, one.guard) == (resumed.stage.beta, resumed.guard)
    state = json.loads(json.dumps(one.stage.state()))
    assert state == json.loads(json.dumps(resumed.stage.state()))


# ---- the judge is silent -----------------------------------------------------------------------


class Silent(Judge):
    """Judges like count_of_a for some calls, then gives no judgement on a share of the answers."""

    def __init__(self, calls, share):
        self.calls, self.share, self.trouble = calls, share, "connection refused"

    def __call__(self, groups):
        self.calls -= 1
        found = count_of_a(groups)
        if self.calls < 0:
            for group in found:
                group[: round(self.share * len(group))] = [None] * round(self.share * len(group))
        return found


@pytest.fixture
def ending(monkeypatch):
    """Every answer ends by itself after two tokens, so that the judge decides on all."""

    def complete(model, prompts, longest, rng, heard=None):
        return [[int(rng.integers(20)), model.config.stop_ids[0]] for _ in prompts]

    monkeypatch.setattr("tinylm.stages.feedback.complete", complete)


@pytest.mark.usefixtures("ending")
def test_a_judge_that_is_mostly_silent_ends_the_run_and_it_can_go_on(tokenizer, tmp_path):
    stage = make_stage(tokenizer, Silent(5, 0.75), max_steps=9, warmup=0.0)
    with pytest.raises(InputError, match=r"6 of 8 .*connection refused.*--resume"):
        begin(stage, tmp_path).run(False)
    assert Checkpoint(tmp_path).state()["step"] == 5
    again = make_stage(tokenizer, count_of_a, max_steps=9, warmup=0.0)
    begin(again, tmp_path).run(True)
    whole = make_stage(tokenizer, count_of_a, max_steps=9, warmup=0.0)
    begin(whole, tmp_path / "whole").run(False)
    assert same(snapshot(whole.model), again.model)


@pytest.mark.usefixtures("ending")
def test_a_failure_in_the_middle_of_a_step_draws_nothing(tokenizer, tmp_path):
    """Two batches to a step, of which the second fails: the first is drawn again on resume."""
    stage = make_stage(tokenizer, Silent(1, 1.0), accumulate=2)
    with pytest.raises(InputError, match="nothing to say"):
        train(stage, 1, tmp_path)
    assert stage.drawn == 0


@pytest.mark.usefixtures("ending")
def test_half_of_the_judgements_are_enough(tokenizer, tmp_path):
    stage = make_stage(tokenizer, Silent(0, 0.5))
    train(stage, 2, tmp_path)


def test_silence_on_most_of_what_is_not_cut_off_is_told(tokenizer, tmp_path, monkeypatch):
    """The others have their score without the judge, who may be out of reach."""

    def complete(model, prompts, longest, rng, heard=None):
        return [[2, model.config.stop_ids[0] if i % 4 == 0 else 2] for i in range(len(prompts))]

    monkeypatch.setattr("tinylm.stages.feedback.complete", complete)
    stage, told = make_stage(tokenizer, Silent(0, 0.25)), []
    stage.say = told.append
    train(stage, 1, tmp_path)
    why = "connection refused"
    assert told == [f"the judge had nothing to say on 2 of 2 whole answers ({why})"]


@pytest.mark.usefixtures("ending")
def test_a_judge_that_fails_in_an_evaluation_loses_no_step(tokenizer, tmp_path):
    """At the end of a run, too: what is left to do then is the evaluation alone."""

    def fails(groups):
        if groups[0].place is None:
            raise InputError("nothing is known of held-out prompts")
        return count_of_a(groups)

    def judged_by(judge):
        stage = make_stage(tokenizer, judge, max_steps=3, save_every=100)
        stage.heldout = stage.prompts[:1]
        return begin(stage, tmp_path)

    with pytest.raises(InputError, match="held-out prompts"):
        judged_by(fails).run(False)
    assert Checkpoint(tmp_path).state()["step"] == 3
    assert judged_by(count_of_a).run(True)["steps"] == 3
    assert [row["step"] for row in read_metrics(tmp_path) if "lr" in row] == [1, 2, 3]


@pytest.mark.usefixtures("ending")
def test_a_run_whose_end_was_put_off_is_not_finished(tokenizer, tmp_path):
    """Its card does not tell of what the weights of the earlier end could do."""

    shorter, longer = (
        begin(make_stage(tokenizer, count_of_a, max_steps=steps), tmp_path) for steps in (2, 4)
    )
    shorter.run(False)
    longer.stage.stopping = True
    with pytest.raises(KeyboardInterrupt):
        longer.run(True)
    state = Checkpoint(tmp_path).state()
    assert (state["step"], state["results"]) == (3, {})
    assert "not finished yet" in (tmp_path / "README.md").read_text()


# ---- answers that all score alike --------------------------------------------------------------


@pytest.mark.parametrize(
    "group, why",
    [
        ([1.0, 1.0], "right"),
        ([1.0, None], "right"),
        ([-1.0, -1.0], "wrong"),
        ([0.0, 0.0], "neutral"),
        ([None, None], "none"),
        ([1.0, 0.5], ""),
        ([1.0, None, 0.5], ""),
    ],
)
def test_why_answers_tell_nothing_apart(group, why):
    assert cause(group) == why


@pytest.mark.parametrize("score, why", [(0.3, "right"), (-2.0, "wrong"), (0.0, "neutral")])
@pytest.mark.usefixtures("ending")
def test_groups_without_a_signal_are_counted_by_cause(tokenizer, tmp_path, score, why):
    stage = make_stage(tokenizer, lambda groups: [[score] * 4 for _ in groups], kl=0.0)
    _, (row,) = train(stage, 1, tmp_path)
    assert row["reason"] == "nothing to learn"
    assert row["equal_groups"] == 1
    found = {key.removeprefix("equal_"): row[key] for key in row if key.startswith("equal_")}
    assert [key for key in found if found[key]] == ["groups", why]


def test_groups_that_were_all_cut_off_are_counted(tokenizer, tmp_path):
    stage = make_stage(tokenizer, constant, max_new_tokens=1, kl=0.0)
    stage.stop_ids = [stage.stop_ids[0]]
    _, (row,) = train(stage, 1, tmp_path)
    assert row["equal_truncated"] > 0


@pytest.mark.usefixtures("ending")
def test_prompts_that_tell_nothing_are_replaced(tokenizer, tmp_path):
    """The judge tells answers apart for one prompt in four; what is learned from is that one."""
    asked = []

    def picky(groups):
        asked.extend(group.row.place for group in groups)
        liked = [g.row.place == "line 3" for g in groups]
        return [[float(i * it) for i in range(len(g.answers))] for g, it in zip(groups, liked)]

    plain = make_stage(tokenizer, picky, kl=0.0).fresh()
    assert plain.notes["equal_groups"] >= 0.5
    asked.clear()
    stage = make_stage(tokenizer, picky, kl=0.0, resample=9)
    batch = stage.fresh()
    assert stage.drawn == len(asked) > 2
    learned = [x.any() for x in batch.by_answer(batch.advantages)]
    assert numpy.reshape(learned, (2, 4)).any(1).all()
    assert batch.notes["equal_groups"] == pytest.approx(1 - 2 / len(asked))
    prompt = stage.form.ids([turn("user", "red bird near an old tree")], True)
    begins = batch.start[:, :, None] + numpy.arange(len(prompt))
    read = [{tuple(row[at]) for at in places} for row, places in zip(batch.tokens, begins)]
    assert set().union(*read) == {tuple(prompt)}
    _, rows = train(stage, 2, tmp_path)
    assert all("event" not in row for row in rows)


# ---- empty answers -----------------------------------------------------------------------------


def test_an_empty_answer_goes_to_the_judge_as_nothing(tokenizer, tmp_path, monkeypatch):
    seen = []

    def judge(groups):
        seen.extend(answer for group in groups for answer in group.answers)
        return [[float(i) for i in range(4)] for _ in groups]

    def complete(model, prompts, longest, rng, heard=None):
        return [[model.config.stop_ids[0]] for _ in prompts]

    monkeypatch.setattr("tinylm.stages.feedback.complete", complete)
    _, (row,) = train(make_stage(tokenizer, judge), 1, tmp_path)
    assert seen == [""] * 8
    assert "event" not in row
    assert numpy.isfinite(row["loss"])
    assert (row["distinct_2"], row["repetition"]) == (0, 0)


def test_the_log_tells_how_varied_the_answers_are(tokenizer, tmp_path):
    stage = make_stage(tokenizer, count_of_a, max_steps=2, truncated=0.0)
    begin(stage, tmp_path).run(False)
    row = next(row for row in read_metrics(tmp_path) if "lr" in row)
    assert {"distinct_2", "repetition", "entropy", "answer_tokens", "truncated", "beta"} <= set(row)
    assert 0 < row["entropy"] < numpy.log(tokenizer.vocab_size) + 1
