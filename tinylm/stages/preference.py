"""Learning from preferences: a reward model, or the model itself by DPO.

The better of two answers is to score more (Bradley and Terry 1952; arXiv 2203.02155):

    p(w beats l) = σ(r_w − r_l),   L = mean over prompts, mean over their pairs, of
                   −log σ(r_w − r_l) + c (r_w + r_l)²

What scores is the only difference. In a reward model it is a head with a single row, read at the
end of an answer; the pairs fix only differences, so the second term keeps the scores around zero
(arXiv 2312.09244). In DPO it is how much likelier an answer has become than it was to the model as
it came, r = β (log π(y) − log π_ref(y)): the best policy under the reward r and a KL price of β is
π itself, so that no reward model and no sampling is needed (arXiv 2305.18290).

All answers to a prompt are in one batch, where it and they are read once.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy

from tinylm import backend, checkpoint, ops
from tinylm.chat import ChatFormat
from tinylm.data import Asked, SharedPrompts, is_held_out, shuffled, source_of
from tinylm.errors import InputError
from tinylm.evaluate import calibration, effective_n, wilson
from tinylm.judges.reward import to_be_read
from tinylm.model import Transformer
from tinylm.preferences import Judged, read_preferences
from tinylm.progress import Progress
from tinylm.settings import EpochConfig, Plan, setting
from tinylm.stage import Stage
from tinylm.tensor import Array, Tensor, no_grad
from tinylm.tokenizer import Tokenizer
from tinylm.train import train


@dataclass
class PreferenceConfig(EpochConfig):
    """Learning from judged prompts: how often, and how many at once."""

    batch_size: int = setting(16, "Prompts, with all their answers, in one forward and backward.")
    held_out: float = setting(0.1, "Share of the prompts held out for evaluation.")


@dataclass
class RewardConfig(PreferenceConfig):
    """A reward model: how fast."""

    learning_rate: float = setting(2e-4, "Peak learning rate.")
    center: float = setting(0.01, "Weight of (r_w + r_l)², which keeps scores around zero.")

    def check(self) -> None:
        self.expect("at least 0", "center")
        super().check()


@dataclass
class DPOConfig(PreferenceConfig):
    """DPO: how fast, and how far from the model as it came."""

    learning_rate: float = setting(1e-4, "Peak learning rate: 0.2 to 0.5 of the fine-tuning's.")
    weight_decay: float = setting(0.0, "Decoupled decay of matrices.")
    beta: float = setting(0.1, "Price of a nat of drift from the fine-tuned model (β).")
    center = 0.0  # no flag: the model as it came keeps the scores around zero

    def check(self) -> None:
        self.expect("more than 0", "beta")
        super().check()


@dataclass
class Comparisons(SharedPrompts):
    """Answers to several prompts, and which of two is the better one."""

    pairs: Array = None  # (pairs, 2): the number of the better answer, and of the worse
    weights: Array = None  # (pairs,): 1 / pairs of the prompt

    def denominator(self) -> int:
        """Prompts: each counts once, however many pairs its answers make."""
        return round(float(self.weights.sum()))


@dataclass
class Compared:
    """A prompt and the answers to it as ids, and (better, worse) numbers of its pairs."""

    judged: Judged
    ids: Asked
    pairs: list[tuple[int, int]]


def bradley_terry(scores: Tensor, pairs: Array, weights: Array, center: float) -> Tensor:
    """(−log σ(r_w − r_l) + c (r_w + r_l)²) · weight of each pair.  scores (answers,) -> (pairs,)

    −log σ(r_w − r_l) is the cross entropy of choosing the better one by softmax(r_w, r_l).
    """
    both = ops.embedding(backend.asarray(pairs), scores.reshape(-1, 1)).reshape(-1, 2)
    nll = ops.cross_entropy(both, backend.asarray(numpy.zeros(len(pairs), "int64")))
    total = both.sum(1)
    return (nll + total * total * center) * backend.asarray(weights, nll.dtype)


class Reward(Stage):
    """The stage: judged prompts, and the loss above."""

    name = "reward"
    about = """A reward model made by tinylm

It reads a conversation and gives a score: of two answers, the one that scores s more is preferred
with a probability of σ(s). Scores lie around zero."""
    others = "another model or other preferences: name the same ones"
    found = (
        ("accuracy",
         "- of two held-out answers the better one scores more in {accuracy:.1%} of {pairs:,} pairs"
         " (95 %: {accuracy_low:.1%} to {accuracy_high:.1%})"),
        ("calibration_error", "- expected calibration error {calibration_error:.3f}\n"),
        ("calibration", "| σ of the difference | found right | pairs |\n|---|---|---|"),
    )  # fmt: skip

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, prompts: list[Compared],
        config: RewardConfig, source: list,
    ):  # fmt: skip
        super().__init__(model, tokenizer, config, source)
        self.train, self.heldout = held_out(prompts, config.held_out)
        self.drawn = 0  # prompts drawn so far

    def draw(self) -> Comparisons:
        """The next prompts of an endless stream."""
        first, n, seed = self.drawn, len(self.train), self.config.seed
        self.drawn += self.config.batch_size
        return self.batch([self.train[shuffled(i, n, seed)] for i in range(first, self.drawn)])

    def batch(self, prompts: list[Compared]) -> Comparisons:
        """All answers to some prompts."""
        first = numpy.cumsum([0, *(len(each.ids[1]) for each in prompts)])
        pairs = [(at + i, at + j) for each, at in zip(prompts, first) for i, j in each.pairs]
        weights = [1 / len(each.pairs) for each in prompts for _ in each.pairs]
        pairs, weights = numpy.array(pairs), numpy.array(weights)
        asked = self.asked([each.ids for each in prompts])
        most = self.model.config.block_size
        return Comparisons.of(asked, most, pairs=pairs, weights=weights)

    def asked(self, prompts: list[Asked]) -> list[Asked]:
        return to_be_read(prompts)

    def scores(self, batch: Comparisons) -> Tensor:
        """r of every answer, (answers,)."""
        return self.model.scores(batch.tokens, batch.ends, batch.start, batch.gap)

    def loss(self, batch: Comparisons) -> Tensor:
        return bradley_terry(self.scores(batch), batch.pairs, batch.weights, self.config.center)

    def memory(self) -> tuple[int, int, int]:
        """No prompt has more tokens than the longest, its answers and padding included."""
        all_of_them = [*self.train, *self.heldout]
        longest = max(all_of_them, key=lambda each: len(each.ids[0]) + sum(map(len, each.ids[1])))
        return self.batch([longest]).tokens.size, 0, 0

    def evaluate(self, final: bool) -> dict:
        """How often the better of two held-out answers scores more, and whether σ(r_w − r_l) is
        the probability that it says; the scores' mean and spread on answers learned from."""
        asked, found = self.heldout if final else self.heldout[:256], {}
        _, margins = self.scored(asked)
        if len(margins):
            hits = (margins > 0) + 0.5 * (margins == 0)
            of = [json.dumps(each.judged.messages) for each in asked for _ in each.pairs]
            right = float(hits.mean())
            low, high = wilson(right, effective_n(hits.tolist(), of))
            error, table = calibration(margins)
            found = {
                "loss": float(numpy.logaddexp(0, -margins).mean()),
                "accuracy": right, "accuracy_low": low, "accuracy_high": high,
                "pairs": len(margins), "calibration_error": error,
            }  # fmt: skip
            found |= {"calibration": table} if final else {}
        made, _ = self.scored(self.train[:256])
        return {**found, "score_mean": float(made.mean()), "score_std": float(made.std())}

    def scored(self, prompts: list[Compared]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """r of every answer to some prompts, and r_w − r_l of every pair."""
        scores, margins, n = [numpy.zeros(0)], [numpy.zeros(0)], self.config.batch_size
        for batch in (self.batch(prompts[i : i + n]) for i in range(0, len(prompts), n)):
            with no_grad():
                r = backend.to_numpy(self.scores(batch).data).astype("float64")
            scores.append(r)
            margins.append(r[batch.pairs[:, 0]] - r[batch.pairs[:, 1]])
        return numpy.concatenate(scores), numpy.concatenate(margins)

    def state(self) -> dict:
        return {"drawn": self.drawn, **super().state()}

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.drawn = state["drawn"]

    def facts(self) -> dict[str, str]:
        parts = f"{len(self.train):,} to learn from, {len(self.heldout):,} held out"
        return {**super().facts(), "prompts": parts}

    def numbers(self, results: dict) -> list[str]:
        table = results.get("calibration", [])
        rows = [f"| {p:.2f} | {right:.2f} | {n} |" for p, right, n in table]
        return [*super().numbers(results), *rows]


class DPO(Reward):
    """The same stage, where the model scores an answer by how much likelier it has become."""

    name = "dpo"
    about = """An assistant improved by preferences, made by tinylm

It read answers of which some had been preferred to others, and those became likelier (DPO)."""

    def __init__(self, model, tokenizer, prompts, config: DPOConfig, source, reference):
        super().__init__(model, tokenizer, prompts, config, source)
        self.reference = reference

    def scores(self, batch: Comparisons) -> Tensor:
        """β (log π − log π_ref) of every answer, its end of turn included."""
        rows = batch.tokens, batch.targets, batch.start
        with no_grad():
            before = self.reference.loss(*rows, gap=batch.gap).data
        nll = self.model.loss(*rows, even=False, gap=batch.gap)
        tokens = numpy.bincount(batch.answer[batch.answer >= 0], minlength=len(batch.ends))
        back = numpy.arange(tokens.max())  # how far before an answer's end
        said = backend.asarray(back < tokens[:, None], nll.dtype)  # (answers, longest): 1 or 0
        places = backend.asarray(numpy.maximum(batch.ends[:, None] - back, 0))
        change = ops.embedding(places, (nll - before).reshape(-1, 1)).reshape(*said.shape)
        return (change * said).sum(1) * -self.config.beta

    def asked(self, prompts: list[Asked]) -> list[Asked]:
        return prompts

    def memory(self) -> tuple[int, int, int]:
        """Besides, there is the model as it came."""
        return super().memory()[0], self.model.n_parameters(), 0

    def evaluate(self, final: bool) -> dict:
        """As for a reward model; and what it now says to the first held-out prompt."""
        asked = (self.heldout or self.train)[0].judged.messages
        return {**super().evaluate(final), "sample": self.sample(asked)}

    def state(self) -> dict:
        asked = [each.judged.messages for each in (self.heldout or self.train)[:4]]
        return {**super().state(), "prompts": asked}  # shown by the report


def held_out(prompts: list[Compared], share: float) -> tuple[list[Compared], list[Compared]]:
    """(to learn from, held out). Rows with one prompt stay together, unless there are few prompts:
    answers that were learned from must not be judged again."""
    known: dict[str, int] = {}
    keys = [json.dumps(each.judged.messages) for each in prompts]
    places = [known.setdefault(key, len(known)) for key in keys]
    if len(known) * share < 2:
        places = range(len(prompts))
    parts: tuple[list[Compared], list[Compared]] = [], []
    for place, each in zip(places, prompts):
        parts[is_held_out(place, share)].append(each)
    return parts


def run(base: Path, data: Path, plan: Plan) -> dict:
    """Make a reward model of the model in directory base, or with a DPOConfig a better one."""
    writes = isinstance(plan.config, DPOConfig)
    model, tokenizer, added = checkpoint.load_for_chat(base, writes)
    plan.progress.given_chat_tokens(base, added)
    plan.open_with((DPO if writes else Reward).name, model, base)
    config = plan.config
    prompts = read_compared(data, ChatFormat(tokenizer), config.block_size, plan.progress)
    source = [checkpoint.digest(base), *source_of([data])]
    if writes:
        reference, _, _ = checkpoint.load_for_chat(base)
        stage = DPO(model, tokenizer, prompts, config, source, reference)
    else:
        stage = Reward(with_score(model), tokenizer, prompts, config, source)
    config.end_after_epochs(len(stage.train))
    n_train, n_held = (sum(len(p.pairs) for p in part) for part in (stage.train, stage.heldout))
    plan.progress.say(f"{n_train:,} pairs to learn from, {n_held:,} held out")
    return train(stage, plan, train_pairs=n_train)


def with_score(model: Transformer) -> Transformer:
    """The same weights under a head that scores, whose row begins as zero: no opinion."""
    made = Transformer(dataclasses.replace(model.config, scores=True))
    known = model.parameters()
    for name, p in made.parameters().items():
        p.data = known[name].data if name in known else p.data
    return made


def read_compared(
    data: Path, form: ChatFormat, block_size: int, progress: Progress
) -> list[Compared]:
    """The judged prompts of a file as ids; says which have an answer that is too long."""
    found, long = [], []
    for judged in read_preferences(data):
        asked, answers = form.asked(judged.messages, judged.answers)
        if len(asked) + max(map(len, answers)) > block_size:
            long.append(judged.place)
        else:
            found.append(Compared(judged, (asked, answers), judged.pairs()))
    progress.left_out(data, long, f"do not fit the context of {block_size} tokens")
    if not found:
        raise InputError(f"{data}: no prompt with its answers fits {block_size} tokens")
    return found
