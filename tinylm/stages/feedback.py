"""Feedback: the model writes several answers, a judge scores them, and the better become likelier.

RLOO, REINFORCE with the other answers as the baseline (arXiv 2402.14740; estimators.py has more):

    y_1 … y_G ~ π_old(· | x)                                      temperature 1, nothing cut off
    r̃_i = r_i − β Σ_t [log π_old(y_it) − log π_ref(y_it)]         the judge's score, less the drift
    A_i = r̃_i − mean of the other r̃_j = G / (G − 1) · (r̃_i − mean r̃)
    L   = −1 / (n L_max) Σ_i Σ_t min(ρ A_i, clip(ρ, 0.8, 1.28) A_i),    ρ = π_θ / π_old of y_it

The sum over t includes the end-of-turn token; n counts the answers of the whole optimizer step, and
L_max is --max-new-tokens: a constant, because a length of its own would favour long wrong answers
(arXiv 2503.20783). π_ref is the model as it came from fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

from tinylm import backend, checkpoint, estimators
from tinylm.answers import EXACT_KL, Answers, opinion
from tinylm.chat import ChatFormat, Row, read_prompts
from tinylm.data import ROW, shuffled, source_of
from tinylm.errors import InputError
from tinylm.estimators import CAUSES, cause, exact_kl, surrogate
from tinylm.evaluate import variety
from tinylm.generate import answers, complete
from tinylm.judges import Group, Judge, human, verifier
from tinylm.judges.choice import JUDGES, MODES, PAGES
from tinylm.judges.watch import Watch
from tinylm.model import Transformer
from tinylm.settings import Plan, TrainConfig, flag, setting
from tinylm.stage import Stage
from tinylm.tensor import Tensor, no_grad
from tinylm.tokenizer import Tokenizer
from tinylm.train import NOT_FINITE, train

JUDGES_OF = {  # by a setting that is for it alone
    "verifier": "verifier", "reward_model": "reward-model", "judge_model": "model",
    "judge_name": "endpoint", "judge_url": "endpoint",
}  # fmt: skip
LEAST_BETA = 0.01  # what a drift beyond its limit costs at least from then on


@dataclass
class FeedbackConfig(TrainConfig):
    """Feedback: who judges, how many answers, how far the model may drift."""

    judge: str = setting("verifier", "Who judges.", False, tuple(JUDGES))
    verifier: str = setting("", "file.py:function(prompt, answer, row) -> number.  [accepted ones]")
    reward_model: str = setting("", "Directory of the reward model.")
    gold: str = setting("", "As --verifier: checks the judge. Nothing is learned from it.")
    judge_model: str = setting("", "Directory of the model that judges.")
    judge_url: str = setting("", "Address of an endpoint like OpenAI's, http://host/v1.", True)
    judge_name: str = setting("", "The endpoint's name for its model.")
    judge_mode: str = setting("auto", "auto: pairwise; of a model, likelihood.", False, MODES)
    judge_concurrency: int = setting(4, "Questions to the endpoint at the same time.", True)
    judge_timeout: float = setting(60.0, "Seconds to wait for its reply.", True)
    confidence: float = setting(0.5, "Answer where this sure: wrong costs t / (1 − t).")
    answers: int = setting(8, "Answers to each prompt (G).")
    estimator: str = setting("rloo", "How scores become advantages.", False, estimators.NAMES)
    updates: int = setting(1, "Optimizer steps on the same answers.")
    max_new_tokens: int = setting(32, "Longest answer, in tokens.")
    resample: int = setting(0, "Times that prompts whose answers all score alike are replaced.")
    truncated: float = setting(-1.0, "Score of an answer cut off at that length.")
    kl: float = setting(0.03, "Price of a nat of drift from the fine-tuned model (β).")
    kl_limit: float = setting(2.0, "Drift per token, nats, beyond which it goes back (0: none).")
    batch_size: int = setting(64, "Answers in one forward and backward: a multiple of --answers.")
    block_size: int = setting(0, "Tokens in a row (0: the model's context).")
    learning_rate: float = setting(1e-4, "Peak learning rate: 0.2 to 0.5 of the fine-tuning's.")
    weight_decay: float = setting(0.0, "Decoupled decay of matrices.")
    max_steps: int = setting(200, "Optimizer steps in all (0: as many as --minutes allows).", True)
    eval_every: int = setting(50, "Steps between evaluations.", True)
    save_every: int = setting(50, "Steps between checkpoints.", True)
    held_out: int = setting(32, "Prompts held out for evaluation, of at least ten times as many.")
    comparisons: int = setting(
        1, "Blind comparisons with the fine-tuned model, to a person's round."
    )
    page: str = setting("auto", "A person's page; auto: in a terminal.", True, PAGES)
    host: str = setting("127.0.0.1", "Address at which the page is served.", True)
    port: int = setting(0, "Its port (0: any that is free).", True)

    def check(self) -> None:
        super().check()
        self.expect("at least 1", "answers", "updates", "max_new_tokens", "judge_concurrency")
        self.expect("at least 0", "resample", "kl", "kl_limit", "held_out", "comparisons")
        self.expect("more than 0", "judge_timeout")
        self.expect("0 to 65535", "port")
        self.expect("0 or more, below 1", "confidence")
        if self.answers < 2:
            raise InputError("--answers 1: an answer is judged beside others, so at least 2")
        if self.batch_size % self.answers:
            raise InputError(
                f"--batch-size {self.batch_size}: not a multiple of --answers {self.answers}"
            )
        if self.updates > 1 and self.accumulate > 1:
            raise InputError(
                f"--updates {self.updates} with --accumulate {self.accumulate}: the same answers "
                "would be added up in one step, not learned from again; raise --batch-size instead"
            )
        for name, judge in JUDGES_OF.items():
            if self.judge == "verifier" and judge != "verifier" and getattr(self, name):
                raise InputError(f"{flag(name)} belongs to another judge: add --judge {judge}")
        if self.judge == "human" and self.resample:
            raise InputError("--resample: a person is not asked more often for it; leave it out")
        if self.judge == "human" and self.answers > 4:
            raise InputError(f"--answers {self.answers}: a person compares up to 4")


class Feedback(Stage):
    """The stage: prompts, sampled answers, a judge, and the loss above."""

    name, cautious = "feedback", True
    about = """An assistant improved by feedback, made by tinylm

It wrote several answers to each prompt, a judge scored them, and the better became likelier."""
    others = "another model or other prompts: name the same ones"
    found = (
        ("held_out_reward", "- mean score on held-out prompts {reward_before:.3f} before, "
         "{held_out_reward:.3f} after"),
        ("win_rate",
         "- {win_rate:.0%} of the last {win_n} comparisons with the fine-tuned model won"),
    )  # fmt: skip

    def __init__(
        self, model: Transformer, reference: Transformer, tokenizer: Tokenizer,
        prompts: list[Row], judge: Judge, config: FeedbackConfig, source: list,
    ):  # fmt: skip
        super().__init__(model, tokenizer, config, source)
        self.reference, self.judge = reference, judge
        every = len(prompts) // config.held_out if config.held_out else 0
        kept = range(every - 1, len(prompts), every) if every >= 10 else range(0)
        self.heldout = [prompts[i] for i in kept][: config.held_out]
        self.prompts = [row for i, row in enumerate(prompts) if i not in kept]
        self.form, self.stop_ids = ChatFormat(tokenizer), model.config.stop_ids
        self.beta = config.kl  # doubled where the drift was too large
        self.drawn = 0  # prompts drawn so far; it seeds the sampling too
        self.baseline = estimators.RunningMean()  # of the scores, for REINFORCE
        self.pending: Answers | None = None  # to be learned from again, `left` times
        self.left = 0
        self.drift = 0.0  # KL per token of the latest answers
        self.gold = verifier.Verifier(verifier.load(config.gold)) if config.gold else None
        self.watch, self.checked = Watch(), []  # (judge's, gold's) of the latest answers
        self.say: Callable[[str], None] = lambda text: None
        self.before: list[str] | None = None  # what the fine-tuned model answers

    def draw(self) -> Answers:
        """Prompts, answers and advantages; the same ones `updates` times."""
        if not self.left:
            self.pending, self.left = self.fresh(), self.config.updates
        self.left -= 1
        return self.pending

    def fresh(self) -> Answers:
        """New answers. Where all to a prompt score alike, another takes its place: --resample."""
        n = self.config.batch_size // self.config.answers
        groups, batch, drift = self.ask(self.drawn, n)
        causes = [self.cause(group) for group in groups]
        for _ in range(self.config.resample):
            alike = [g for g, group in enumerate(groups) if cause(group.scores)]
            if not alike:
                break
            others, *_ = self.ask(self.drawn + len(causes), len(alike))
            causes += [self.cause(group) for group in others]
            for g, other in zip(alike, others):
                groups[g] = other
            batch, drift = self.as_batch(groups)
        self.drawn += len(causes)  # not before: a judge that fails has drawn nothing
        return self.weighed(batch, groups, drift, causes)

    def ask(self, place: int, n: int) -> tuple[list[Group], Answers, numpy.ndarray]:
        """n prompts of the stream, from a place on, with judged answers, the batch that these make,
        and the drift of each."""
        G = self.config.answers
        rows = [self.prompt(place + i) for i in range(n)]
        prompts = [self.form.ids(row.messages, True) for row in rows]
        said = self.judge.begin(place, rows)
        if said is None:
            rng = numpy.random.default_rng((self.config.seed, place))
            asked = [ids for ids in prompts for _ in range(G)]
            size, heard = self.config.max_new_tokens, self.judge.hear
            said = complete(self.model, asked, size, rng, heard=heard)
        groups = [
            self.group(row, ids, place + g, said[g * G :][:G])
            for g, (row, ids) in enumerate(zip(rows, prompts))
        ]
        batch, drift = self.as_batch(groups)
        logp = iter(batch.by_answer(batch.old_logp))
        for group in groups:
            group.logp = [next(logp).tolist() for _ in group.ids]
        self.score(groups)
        return groups, batch, drift

    def prompt(self, i: int) -> Row:
        """Prompt i of an endless stream: each epoch all of them, in an order of its own."""
        return self.prompts[shuffled(i, len(self.prompts), self.config.seed)]

    def group(self, row: Row, prompt: list[int], place: int, said: list[list[int]]) -> Group:
        return Group(row, [self.text(ids) for ids in said], place, prompt, said)

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids]).strip()

    def score(self, groups: list[Group]) -> None:
        """The judge's scores; an answer that is cut off has its fixed one.

        Where a judge, unless it is a person who may skip, is silent on most of what is not cut off,
        it says so; raises InputError where that is most of all.
        """
        checks, found = self.gold(groups) if self.gold else [], self.judge(groups)
        pairs = (pair for of in zip(found, checks) for pair in zip(*of))
        self.checked += [pair for pair in pairs if None not in pair]
        for group, scores in zip(groups, found):
            group.scores = [
                score if ended else self.config.truncated
                for score, ended in zip(scores, self.ended(group))
            ]
        every = [score for group in groups for score in group.scores]
        silent, ended = every.count(None), sum(sum(self.ended(group)) for group in groups)
        if self.config.judge == "human" or 2 * silent <= ended:
            return
        why = self.judge.trouble or "it gave None"
        if 2 * silent > len(every):
            raise InputError(
                f"the judge had nothing to say on {silent} of {len(every)} answers "
                f"({why}); what was learned is saved: see to it, then run again with --resume"
            )
        self.say(f"the judge had nothing to say on {silent} of {ended} whole answers ({why})")

    def ended(self, group: Group) -> list[bool]:
        """Of each answer, whether it ends by itself; others are cut off."""
        return [ids[-1] in self.stop_ids for ids in group.ids]

    def cause(self, group: Group) -> str:
        """Why all answers score alike; "" where they do not."""
        return cause(group.scores) if any(self.ended(group)) else "truncated"

    def gold_notes(self) -> dict[str, float]:
        """What gold says of the answers that the judge has just scored. The judge's mean is of the
        same ones: without the fixed score of what was cut off, with what --resample replaced."""
        if not self.checked:
            return {}
        (judged, gold), self.checked = numpy.mean(self.checked, 0).tolist(), []
        if self.watch.see(judged, gold):
            self.say(
                f"the judge is being outwitted: its scores rise (now {judged:.3f}), and gold's "
                f"fall (best {self.watch.best[1]:.3f}, now {gold:.3f}); an earlier checkpoint, a "
                "higher --kl or a better judge would do better"
            )
        return {"gold": gold, "outwitted": float(self.watch.outwitted)}

    def weighed(
        self, batch: Answers, groups: list[Group], drift: numpy.ndarray, causes: list[str]
    ) -> Answers:
        """The batch with advantages, from scores and drift, and numbers for the log."""
        rewards = [
            [None if r is None else r - self.beta * float(d) for r, d in zip(group.scores, of)]
            for group, of in zip(groups, drift.reshape(len(groups), -1))
        ]
        batch.harm = self.harm(self.drift)
        if batch.harm:
            A = numpy.zeros(len(drift))
        else:
            A = estimators.advantages(self.config.estimator, rewards, self.baseline)
        batch.advantages = backend.asarray(numpy.where(batch.answer < 0, 0, A[batch.answer]))
        scores = [r for group in groups for r in group.scores if r is not None]
        judged = numpy.array(scores or [0.0])
        cut_off = [not ended for group in groups for ended in self.ended(group)]
        batch.notes = {
            "reward": float(judged.mean()),
            "positive": float((judged > 0).mean()),
            "negative": float((judged < 0).mean()),
            "kl": self.drift,
            "answer_tokens": batch.trained_tokens() / len(A),
            "truncated": float(numpy.mean(cut_off)),
            "entropy": -float(batch.old_logp.sum()) / batch.trained_tokens(),
            **variety([text for group in groups for text in group.answers]),
            "beta": self.beta,
            "equal_groups": sum(map(bool, causes)) / len(causes),
            **{f"equal_{why}": causes.count(why) / len(causes) for why in CAUSES},
            **self.judge.notes(),
            **self.gold_notes(),
        }
        return batch

    def harm(self, kl: float) -> str:
        """Why nothing must be learned from answers at this drift, or ""."""
        if not math.isfinite(kl):
            return NOT_FINITE
        limit = self.config.kl_limit
        return f"drift of {kl:.3g} nats per token, over {limit:g}" if 0 < limit < kl else ""

    def recover(self, refusal: str) -> None:
        """The loop went back to earlier weights: answers of the later ones go, drift costs more."""
        self.left = 0
        if refusal != NOT_FINITE:
            self.beta = max(2 * self.beta, LEAST_BETA)

    def as_batch(self, groups: list[Group]) -> tuple[Answers, numpy.ndarray]:
        """The answers as a batch that is ready to be learned from, but for the advantages, and of
        each Σ_t log π_old − log π_ref (answers,). Remembers the KL per token as .drift."""
        most, length = self.model.config.block_size, self.config.max_new_tokens
        asked = [(group.prompt, group.ids) for group in groups]
        batch = Answers.of(asked, most, self.stop_ids[0], length=length)
        nll, logp = opinion(self.model, batch)
        with no_grad():
            ref, reference = opinion(self.reference, batch)
        batch.old_logp = -nll.data
        if self.config.accumulate == 1:  # else the tapes of all batches would wait at once
            batch.nll = nll
        known = batch.targets >= 0
        drift = backend.to_numpy(ref.data - nll.data).astype("float64")
        if logp is not None:
            kl = exact_kl(logp, reference)
        else:  # k3 of arXiv 2402.03300: e^x − 1 − x
            kl = numpy.expm1(-drift[known]) + drift[known]
        self.drift = float(numpy.maximum(float(kl.mean()), 0))  # rounding may leave -1e-9
        return batch, numpy.bincount(batch.answer[known], drift[known])

    def loss(self, batch: Answers) -> Tensor:
        nll, batch.nll = batch.nll, None  # a later update asks a model that has moved
        if nll is None:
            nll = self.model.loss(batch.tokens, batch.targets, batch.start, False, batch.gap)
        return surrogate(nll, batch.old_logp, batch.advantages)

    def memory(self) -> tuple[int, int, int]:
        """A row is an answer with its share of a prompt, or of the prompt's rows where it takes
        several. Besides, there are the fine-tuned model, the weights and moments to go back to (of
        a GPU, the CPU keeps these), and both models' logits."""
        c, most, V = self.config, self.model.config.block_size, self.model.config.vocab_size
        asked = max(len(self.form.ids(row.messages, True)) for row in self.prompts)
        width = min(most, max(ROW, asked + c.answers * c.max_new_tokens))
        rows = -(-c.answers // max(1, min(c.answers, (most - asked) // c.max_new_tokens)))
        kept = (1 if backend.name == "cuda" else 4) * self.model.n_parameters()
        return -(-width * rows // c.answers), kept, 2 * c.max_new_tokens * V if V <= EXACT_KL else 0

    def evaluate(self, final: bool) -> dict:
        """Greedy answers to held-out prompts, before feedback and now: scores, how often the new
        one scores more (a tie counts half), and one such pair."""
        summary = self.judge.summary()
        if not self.heldout:
            return summary
        asked = [row.messages for row in self.heldout]
        most = self.config.max_new_tokens
        if self.before is None:
            self.before = answers(self.reference, self.tokenizer, asked, most)
        after = answers(self.model, self.tokenizer, asked, most)
        pairs = zip(self.heldout, self.before, after)
        scores = self.judge([Group(row, [old, new]) for row, old, new in pairs])
        scores = numpy.array([pair for pair in scores if None not in pair])
        found = variety(after)
        if len(scores):
            old, new = scores.T
            found |= {"reward_before": float(old.mean()), "held_out_reward": float(new.mean())}
            found["preferred"] = float((new > old).mean() + (new == old).mean() / 2)
        i = numpy.argmax([old != new for old, new in zip(self.before, after)])  # 0 if none does
        question = asked[i][-1]["content"]
        return {
            **summary,
            **found,
            **self.judge.notes(),
            "sample": f"{question} -> {self.before[i]} -> {after[i]}",
        }

    def state(self) -> dict:
        return {
            "drawn": self.drawn,
            **super().state(),
            "left": self.left,
            "baseline": asdict(self.baseline),
            "beta": self.beta,
            "watch": asdict(self.watch),
            "prompts": [row.messages for row in (self.heldout or self.prompts)[:4]],
            **(self.pending.state() if self.left else {}),
        }

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.drawn, self.left = state["drawn"], state["left"]
        self.beta = state.get("beta", self.config.kl)
        self.watch = Watch(**state.get("watch", {}))
        self.baseline = estimators.RunningMean(**state.get("baseline", {}))
        if self.left:
            self.pending = Answers.of_state(state, self.config.max_new_tokens)

    def facts(self) -> dict[str, str]:
        c = self.config
        judge = next((getattr(c, name) for name, of in JUDGES_OF.items() if of == c.judge), "")
        return {
            **super().facts(),
            "stage": f"feedback: {c.estimator}, judged by {c.judge}{judge and f' `{judge}`'}",
            "context": "",  # the fine-tuned model's
            "prompts": f"{len(self.prompts):,} to learn from, {len(self.heldout):,} held out",
            "answers": f"{c.answers} to each prompt, of up to {c.max_new_tokens} tokens",
        }


def run(source: Path, prompts: Path, plan: Plan) -> dict:
    """Improve the model in directory source on a file of prompts; returns the results."""
    model, tokenizer, added = checkpoint.load_for_chat(source)
    progress = plan.progress
    if added is not None:
        progress.say(
            f"{source} was never fine-tuned to answer. This will hardly work: it goes on writing "
            "text, so all its answers score alike, and where no answer is better than another "
            f"nothing is learned. First: tinylm sft {source} --data FILE.jsonl --out DIR",
            "bold yellow",
        )
    if plan.config.judge == "human":
        for name in human.DEFAULTS.keys() - plan.given:
            setattr(plan.config, name, human.DEFAULTS[name])
    plan.open_with(Feedback.name, model, source)
    config = plan.config
    rows = read_fitting(prompts, ChatFormat(tokenizer), config)
    origin = [checkpoint.digest(source), *source_of([prompts])]
    reference, _, _ = checkpoint.load_for_chat(source)
    judge = JUDGES[config.judge](config)
    if config.judge == "verifier" and not config.verifier:
        judge([Group(row, [""]) for row in rows])  # a row that lacks "accepted" is told now
    stage = Feedback(model, reference, tokenizer, rows, judge, config, origin)
    stage.say = lambda text: progress.say(text, "bold yellow")
    progress.say(
        f"{len(stage.prompts):,} prompts to learn from, {len(stage.heldout):,} held out; "
        f"{config.answers} answers to each, judged by: {config.judge}"
    )
    with judge.attending(stage, plan.out, progress):
        return train(stage, plan, prompts=len(stage.prompts))


def read_fitting(path: Path, form: ChatFormat, config: FeedbackConfig) -> list[Row]:
    """The prompts of a file, each of which must leave room for an answer."""
    rows = list(read_prompts(path))
    for row in rows:
        size = len(form.ids(row.messages, True))
        if size + config.max_new_tokens > config.block_size:
            remedy = "leave out its first turns" if row.messages[1:] else "shorten it"
            remedy += ", or lower --max-new-tokens" if size < config.block_size else ""
            raise InputError(
                f"{path}, {row.place}: the prompt has {size} tokens, which leaves no room for "
                f"an answer of {config.max_new_tokens} in a context of {config.block_size}: "
                f"{remedy}"
            )
    return rows
