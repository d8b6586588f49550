"""Learning from preferences: a reward model, that it judges, and DPO."""

import json

import numpy
import pytest
from commands import metrics, python, refused, succeeds, untrained, weights, write_rows

import tinylm as package
from tinylm import checkpoint
from tinylm.chat import Row, turn
from tinylm.checkpoint import Checkpoint
from tinylm.errors import InputError
from tinylm.evaluate import calibration, wilson
from tinylm.judges import Group
from tinylm.judges.reward import RewardModel, scores
from tinylm.preferences import Judged
from tinylm.stages.preference import (
    DPO,
    Compared,
    DPOConfig,
    Reward,
    RewardConfig,
    bradley_terry,
    held_out,
    with_score,
)
from tinylm.tensor import Tensor


@pytest.mark.usefixtures("float64")
def test_the_loss_is_the_formula_and_its_gradient():
    """Also where a difference is so large that exp overflows."""
    r, pairs = numpy.array([0.3, -1.0, 2.0, 900.0]), numpy.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    weights = numpy.array([1.0, 0.5, 0.5, 1.0])

    def value(r):
        w, l = r[pairs[:, 0]], r[pairs[:, 1]]
        return (numpy.logaddexp(0, l - w) + 0.01 * (w + l) ** 2) * weights

    x = Tensor(r, requires_grad=True)
    loss = bradley_terry(x, pairs, weights, 0.01)
    assert numpy.allclose(loss.data, value(r), rtol=1e-12)
    loss.sum().backward()
    for i, step in enumerate(numpy.eye(4) * 1e-5):
        slope = (value(r + step).sum() - value(r - step).sum()) / 2e-5
        assert x.grad[i] == pytest.approx(slope, rel=1e-6)


def test_memory_is_foreseen_for_the_answers_there_are(model):
    """Not for rows as long as the context, nor for less than many answers to a prompt take."""
    model.config.block_size = 4096
    judged = Judged([turn("user", "a")], ["x", "y"], [1.0, 0.0])
    few = [Compared(judged, ([9] * n, [[1] * n, [2] * n]), [(0, 1)]) for n in range(1, 60)]
    many = [*few, Compared(judged, ([9] * 50, [[1] * 40] * 100), [(0, 1)])]
    for made in (few, many):
        stage = DPO(model, None, made, DPOConfig(max_steps=1, batch_size=59), [], model)
        tokens, kept, _ = stage.memory()
        assert stage.batch(made[-59:]).tokens.size <= 59 * tokens
        assert tokens <= 2 * stage.batch(made[-1:]).tokens.size
        assert kept == model.n_parameters()
    assert tokens > 4000


def test_every_prompt_counts_once_however_many_answers(model):
    three = Judged([turn("user", "a")], ["x", "y", "z"], [1.0, 3.0, 2.0])
    two = Judged([turn("user", "b")], ["x", "y"], [1.0, 0.0])
    made = [
        Compared(each, ([9], [[n] for n in range(len(each.answers))]), each.pairs())
        for each in (three, two)
    ]
    batch = DPO(model, None, made, DPOConfig(max_steps=1), [], model).batch(made)
    assert sorted(map(tuple, batch.pairs.tolist())) == [(1, 0), (1, 2), (2, 0), (3, 4)]
    assert batch.weights.sum() == pytest.approx(2)
    assert batch.denominator() == 2


def test_pairs_of_one_prompt_that_are_judged_alike_count_as_one(model, monkeypatch):
    """Three answers make three pairs, but 40 prompts do not make an interval of 120 trials."""
    pairs = [(0, 1), (0, 2), (1, 2)]
    made = [Compared(Judged([turn("user", str(i))], [], []), ([], []), pairs) for i in range(40)]
    stage = Reward(model, None, made, RewardConfig(max_steps=1), [])
    stage.heldout, margins = made, numpy.repeat([1.0, -1.0] * 20, 3)
    monkeypatch.setattr(stage, "scored", lambda prompts: (margins, margins))
    found = stage.evaluate(False)
    assert (found["accuracy"], found["pairs"]) == (0.5, 120)
    interval = found["accuracy_low"], found["accuracy_high"]
    assert interval == pytest.approx(wilson(0.5, 39))  # of 40, one is lost to the mean


def test_what_is_held_out_was_not_learned_from():
    """Rows with one prompt stay together; with a single prompt in the file, rows are split."""

    def rows(prompts):
        return [Compared(Judged([turn("user", p)], [], [], i), ([], []), []) for i, p in prompts]

    many = rows((i, f"prompt {i // 3}") for i in range(120))
    train, test = held_out(many, 0.1)
    asked = [{json.dumps(each.judged.messages) for each in part} for part in (train, test)]
    assert not asked[0] & asked[1]
    assert len(test) == 12
    train, test = held_out(rows((i, "always this") for i in range(120)), 0.1)
    assert (len(train), len(test)) == (108, 12)
    assert [*map(len, held_out(many, 0.7))] == [36, 84]  # of 40 prompts


def test_calibration_of_a_judge_that_is_as_sure_as_it_may_be():
    rng = numpy.random.default_rng(0)
    sure = rng.uniform(0, 3, 200_000)
    right = rng.random(len(sure)) < 1 / (1 + numpy.exp(-sure))
    margins = numpy.where(right, sure, -sure)
    error, table = calibration(margins)
    assert error < 0.01
    assert sum(n for _, _, n in table) == len(margins)
    assert calibration(10 * margins)[0] > 0.15  # ten times too sure
    assert calibration(numpy.zeros(5))[0] == 0  # knows nothing, and says so


# ---- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained model that can read; of its answers, those with more a's are liked."""
    folder = tmp_path_factory.mktemp("reward") / "base"
    return untrained(folder, "say abcdefghijklmnopqrstuvwxyz. ?", 2, 2, 2, 32, 64, 48)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    rng = numpy.random.default_rng(3)
    rows = []
    for i in range(400):
        answers = ["".join(rng.choice(list("abc"), 6)) for _ in range(3)]
        marks = [float(answer.count("a")) for answer in answers]
        prompt = f"say {'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}?"
        rows.append({"prompt": prompt, "answers": answers, "scores": marks})
    return write_rows(tmp_path_factory.mktemp("reward") / "preferences.jsonl", rows)


SHORT = ["--learning-rate", "3e-3", "--batch-size", "8", "--save-every", "20", "--seed", "4"]


@pytest.fixture(scope="module")
def trained(base, preferences, tmp_path_factory):
    out = tmp_path_factory.mktemp("reward") / "run"
    done = succeeds("reward", base, "--data", preferences, "--out", out, *SHORT, "--epochs", "3",
                    "--json")  # fmt: skip
    return out, json.loads(done.stdout)


def test_it_learns_which_answer_is_liked(trained):
    out, found = trained
    assert found["accuracy"] > 0.9
    assert found["accuracy_low"] < found["accuracy"] <= found["accuracy_high"]
    assert found["pairs"] > 50
    assert found["calibration_error"] < 0.2
    assert abs(found["score_mean"]) < found["score_std"]  # scores lie around zero
    losses = [row["loss"] for row in metrics(out) if "lr" in row]
    assert losses[0] == pytest.approx(numpy.log(2), abs=1e-6)  # it begins without an opinion
    card = (out / "README.md").read_text()
    assert f"{found['accuracy']:.1%}" in card
    assert "calibration" in card
    assert (out / "report.html").exists()


def test_interrupted_and_resumed_it_has_the_same_bits(trained, base, preferences, tmp_path):
    steps = trained[1]["steps"]
    begin = ["reward", base, "--data", preferences, "--out", tmp_path / "r", *SHORT]
    program = (
        "import sys, tinylm.train as train; from tinylm.cli import run\n"
        "update = train.Trainer.update\n"
        "def stop(self):\n"
        "    row = update(self); self.stage.stopping = self.step == 33; return row\n"
        "train.Trainer.update = stop\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    python(program, *begin, "--max-steps", steps, cwd=tmp_path, code=130)
    succeeds(*begin, "--max-steps", steps, "--resume")
    assert weights(tmp_path / "r") == weights(trained[0])


@pytest.mark.parametrize("command", ["reward", "sft"])
def test_another_model_on_resume_is_refused(command, base, preferences, tmp_path):
    """Of another shape, too, whose weights have other names."""
    rows = [{"prompt": "say aa", "completion": "a"}] * 8
    data = preferences if command == "reward" else write_rows(tmp_path / "rows", rows)
    begun = ["--data", data, "--out", tmp_path / "r", "--max-steps", "1"]
    succeeds(command, base, *begun)
    other = untrained(tmp_path / "other", "abcsayz? .", 1, 2, 2, 16, 32, 64)
    more = ["--resume", "--max-steps", "2"]
    refused(command, other, *begun[:4], *more, saying="this run was begun with another model")


def test_another_base_of_the_same_shape_on_resume_is_refused(base, tmp_path):
    """By its weights, in shards too; a run of a time when these were not noted is gone on with."""
    data = write_rows(tmp_path / "rows", [{"prompt": "say aa", "completion": "a"}] * 8)
    more = ["--data", data, "--out", tmp_path / "r", "--max-steps"]
    succeeds("sft", base, *more, "1")
    other = tmp_path / "other"
    model, tokenizer = checkpoint.load(base)
    model.embedding.weight.data *= 2
    checkpoint.save(model, tokenizer, other)
    (other / "model.safetensors").rename(other / "shard-1.safetensors")
    shards = {"weight_map": dict.fromkeys(model.parameters(), "shard-1.safetensors")}
    (other / "model.safetensors.index.json").write_text(json.dumps(shards))
    refused("sft", other, *more, "2", "--resume", saying="this run was begun with another model")
    succeeds("sft", base, *more, "2", "--resume")
    saved = Checkpoint(tmp_path / "r")
    tensors, state = checkpoint.read_tensors(saved.path), saved.state()
    state["stage"]["source"] = state["stage"]["source"][1:]
    checkpoint.write_tensors(saved.path, tensors, {"state": json.dumps(state)})
    succeeds("sft", other, *more, "3", "--resume")


def test_it_judges_answers_to_prompts_it_never_saw(trained):
    judge = RewardModel(str(trained[0]))
    groups = [
        Group(Row("line 1", [turn("user", "say zz?")], {}), ["aaaaaa", "bcbcbc", "", "a" * 99])
    ]
    ((many, none, empty, long),) = judge(groups)
    assert many > none
    assert isinstance(empty, float)  # an empty answer is legal
    assert long is None  # it does not fit the context: no judgement
    assert judge([]) == []


def test_a_score_does_not_depend_on_the_others_in_the_batch(trained):
    model, tokenizer = checkpoint.load(trained[0])
    asked, *answers = (tokenizer.encode(text) for text in ("say aa", "b", "", "abcabcabc"))
    together = scores(model, [(asked, answers), (asked[:1], answers[::-1])])
    alone = [
        scores(model, [([*prompt, *answer], [[]])])[0]
        for prompt, some in ((asked, answers), (asked[:1], answers[::-1]))
        for answer in some
    ]
    assert numpy.allclose(together, alone, atol=1e-5)


def test_transformers_reads_it_as_a_classifier_of_one_label(trained):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(trained[0])
    model, tokenizer = checkpoint.load(trained[0])
    for text in ("say aa", "b", "abcabcabc"):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        with torch.no_grad():
            score = theirs(torch.tensor([ids])).logits.item()
        assert score == pytest.approx(scores(model, [(ids, [[]])])[0], abs=1e-5)


def test_both_shapes_score_and_are_saved(model, tmp_path):
    made = with_score(model)
    made.score.weight.data = made.score.weight.data + 1
    checkpoint.save(made, None, tmp_path / "r")
    loaded, _ = checkpoint.load(tmp_path / "r")
    asked = [([5, 6], [[7], [8, 9]])]
    assert numpy.array_equal(scores(loaded, asked), scores(made, asked))
    assert "lm_head.weight" not in loaded.parameters()
    with pytest.raises(InputError, match="reward model"):
        loaded([[5, 6, 7]])


# ---- DPO ---------------------------------------------------------------------------------------


@pytest.fixture
def compared():
    judged = Judged([turn("user", "?")], ["x", "y", "z"], [1.0, 3.0, 2.0])
    return [Compared(judged, ([5, 6], [[7, 1], [8, 9, 1], [1]]), judged.pairs())]


@pytest.mark.usefixtures("float64")
def test_dpo_scores_how_much_likelier_an_answer_has_become(config, compared):
    """Against probabilities worked out one by one; prompt and padding do not count."""
    models = [package.Transformer(config, seed) for seed in (1, 2)]
    for model in models:
        for p in model.parameters().values():
            p.data = p.data.astype("float64")
    settings = DPOConfig(beta=0.3, held_out=0, max_steps=1)
    stage = DPO(models[0], None, compared, settings, [], models[1])
    found = stage.scores(stage.batch(compared)).data

    def logp(model, row):
        logits = model(numpy.array([row[:-1]])).data[0]
        p = logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))
        return sum(p[t, row[t + 1]] for t in range(1, len(row) - 1))

    asked, answers = compared[0].ids
    rows = [[*asked, *answer] for answer in answers]
    expected = [0.3 * (logp(models[0], row) - logp(models[1], row)) for row in rows]
    assert numpy.allclose(found, expected, atol=1e-12)
    stage.model = models[1]  # as it came: no score, and the loss is that of a coin
    batch = stage.batch(compared)
    assert numpy.allclose(stage.loss(batch).data * len(batch.pairs), numpy.log(2))


def test_dpo_makes_the_preferred_likelier(base, preferences, tmp_path):
    done = succeeds("dpo", base, "--data", preferences, "--out", tmp_path / "d", "--epochs", 2,
                    "--learning-rate", "3e-3", "--batch-size", 8, "--json")  # fmt: skip
    found = json.loads(done.stdout)
    assert found["accuracy"] > 0.8 and found["loss"] < numpy.log(2)
    losses = [row["loss"] for row in metrics(tmp_path / "d") if "lr" in row]
    assert losses[0] == pytest.approx(numpy.log(2), abs=1e-6)
    assert "(DPO)" in (tmp_path / "d" / "README.md").read_text()
    again = succeeds("dpo", base, "--data", preferences, "--out", tmp_path / "d", "--resume")
    assert "finished" in again.stderr


# ---- what can be wrong -------------------------------------------------------------------------


def test_what_is_no_reward_model_is_a_sentence(base, trained, tmp_path):
    with pytest.raises(InputError, match="--reward-model DIR"):
        RewardModel("")
    with pytest.raises(InputError, match="tinylm reward"):
        RewardModel(str(base))
    model, tokenizer = checkpoint.load(trained[0])
    checkpoint.save(model, None, tmp_path / "mute")
    with pytest.raises(InputError, match="no tokenizer"):
        RewardModel(str(tmp_path / "mute"))
    model.config.eos_token_id = 0
    checkpoint.save(model, tokenizer, tmp_path / "mixed")
    with pytest.raises(InputError, match="do not belong together"):
        RewardModel(str(tmp_path / "mixed"))
    for change, said in (({"id2label": {"0": "a", "1": "b"}}, "several labels"),
                         ({"id2label": None}, "several labels")):  # fmt: skip
        config = tmp_path / "mute" / "config.json"
        content = {**json.loads(config.read_text()), **change}
        config.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        with pytest.raises(InputError, match=said):
            checkpoint.load(tmp_path / "mute")


def test_generating_with_a_reward_model_is_a_sentence(trained):
    refused("generate", trained[0], "say", saying="scores answers and writes none")


@pytest.mark.parametrize(
    "command", [("sft", "--data"), ("dpo", "--data"), ("feedback", "--prompts")]
)
def test_a_reward_model_cannot_be_taught_to_answer(command, trained, preferences, tmp_path):
    """It says so before it has made a run."""
    name, data = command
    arguments = [trained[0], data, preferences, "--out", tmp_path / "r", "--max-steps", 1]
    refused(name, *arguments, saying="is a reward model: it scores answers and writes none")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", [["generate", "The"], ["fill", "The ___."], ["eval"]])
def test_a_reward_model_writes_nothing(command, trained):
    name, *text = command
    done = refused(name, trained[0], *text, saying="is a reward model: it scores answers")
    assert not done.stdout


def test_answers_too_long_are_left_out_and_named(base, tmp_path):
    row = {"prompt": "say", "chosen": "a" * 99, "rejected": "b"}
    path = write_rows(tmp_path / "p.jsonl", [row])
    start = ["reward", base, "--data", path, "--out", tmp_path / "r"]
    refused(*start, saying="are left out: line 1")
    refused(*start, saying="fits 48 tokens")


@pytest.mark.parametrize("answers", [[[], [3, 4]], [[3, 4], []], [[], []]])
def test_an_answer_of_no_tokens_is_as_likely_as_it_was(answers, model):
    made = [Compared(Judged([turn("user", "a")], ["x", "y"], [1, 0]), ([9], answers), [(0, 1)])]
    stage = DPO(model, None, made, DPOConfig(max_steps=1), [], model)
    assert stage.scores(stage.batch(made)).data.tolist() == [0, 0]
