"""The feedback stage on a tiny model, with a judge that is a function; no directory is needed."""

import numpy

import tinylm
from tinylm.chat import Row, turn
from tinylm.judges import Judge
from tinylm.progress import Progress
from tinylm.stages.feedback import Feedback, FeedbackConfig
from tinylm.train import Trainer

ASKED = ["the cat", "a moon?", "red bird near an old tree", "it sang"]
SOURCE = ["hash of the model", ["prompts.jsonl", 1]]


class Says(Judge):
    """The judge that is a function of groups."""

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, groups):
        return self.scores(groups)


def make_stage(tokenizer, judge, **settings) -> Feedback:
    shape = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = tinylm.ModelConfig(tokenizer.vocab_size, 2, 2, 2, 32, 64, 64, **shape)
    model, reference = tinylm.Transformer(config, 1), tinylm.Transformer(config, 1)
    rng = numpy.random.default_rng(2)
    for p, q in zip(model.parameters().values(), reference.parameters().values()):
        p.data = p.data + 0.1 * rng.standard_normal(p.shape, "float32")
        q.data = p.data.copy()
    rows = [Row(f"line {i}", [turn("user", text)], {}) for i, text in enumerate(ASKED, 1)]
    defaults = {"answers": 4, "batch_size": 8, "max_new_tokens": 6, "learning_rate": 1e-2}
    config = FeedbackConfig(**{**defaults, **settings})
    judge = judge if isinstance(judge, Judge) else Says(judge)
    return Feedback(model, reference, tokenizer, rows, judge, config, SOURCE)


def constant(groups):
    return [[0.3] * len(group.answers) for group in groups]


def count_of_a(groups):
    return [[float(answer.count("a")) for answer in group.answers] for group in groups]


def begin(stage, folder) -> Trainer:
    return Trainer(stage, stage.config, folder, Progress())


def train(stage, steps, folder) -> tuple[Trainer, list[dict]]:
    trainer = begin(stage, folder)
    return trainer, [trainer.update() for _ in range(steps)]


def snapshot(model) -> dict:
    return {name: p.data.copy() for name, p in model.parameters().items()}


def same(weights, model) -> bool:
    return all(numpy.array_equal(weights[name], p.data) for name, p in model.parameters().items())
