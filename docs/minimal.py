"""From raw text to an assistant in two hundred lines: all three stages, in about two minutes.

    pip install . && python docs/minimal.py  # four times as long without a C++ compiler

The text tells of every country its capital, continent and money. A Transformer of two layers, one
token per character, reads it (pre-training); is shown questions about some countries, with answers
(fine-tuning); then answers questions about others four times each, and hears which answers were
right (feedback). It is tested on countries that no question was ever about: what it knows of them,
it has read. Fine-tuning shows short answers and whole sentences. Nobody says which are better, but
who repeats the country's name comes to its capital more easily: feedback finds that out. It makes
the better form likelier, and teaches hardly a capital.

Gradients, ops and AdamW's arithmetic are tinylm's: tensor.py, ops.py and the kernels. Everything
else that the package adds (BPE, shards, fused losses, checkpoints, a KV cache) makes this faster,
safer or larger, but not different in kind.
"""

from pathlib import Path

import numpy as np

import tinylm
from tinylm import Tensor, no_grad, ops

T, C, H, L = 128, 96, 4, 2  # context (of a question and its answer), width, heads, layers
STEPS = 1600, 100, 40  # of pre-training, fine-tuning and feedback
rng = np.random.default_rng(0)

# ---- the world: facts, and sentences that tell them ------------------------------------------

table = Path(__file__).parent.parent / "data" / "almanac" / "country.tsv"
# a line: name, capital, continent, money …, each perhaps with others after a "|"; empty: disputed
lines = [line for line in table.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
cells = [[cell.split("|")[0] for cell in line.split("\t")[:4]] for line in lines[1:]]
facts = {name: told for name, *told in cells if all(told)}
practised, judged, never_asked = np.split(rng.permutation(list(facts)), [80, 150])

WORDINGS = (  # {0} is the country, {1} its capital, continent or money
    ("The capital of {} is {}.", "In {} the capital is called {}.", "{1} is the capital of {0}."),
    ("{} is part of {}.", "In {1} lies {0}.", "A country of {1} is {0}."),
    ("In {} people pay with the {}.", "{} has the {}.", "The {1} is the money of {0}."),
)


def document(name):
    """The three facts of a country, in any order and in any words."""
    told = [rng.choice(WORDINGS[i]).format(name, facts[name][i]) for i in rng.permutation(3)]
    return " ".join(told) + "\n"


def question(name):
    """It begins with the end of a document, as every row of pre-training does."""
    return f"\nCapital of {name}?\n"


def right_answers(name):
    """As a whole sentence, and in short."""
    capital = facts[name][0]
    return [f"The capital of {name} is {capital}.\n", f"{capital}.\n"]


# ---- tokens: characters become numbers -------------------------------------------------------

# all that occur in facts and wordings, and a few that Python prints around them
characters = sorted(set(f"\n{facts}{WORDINGS}{question('')}"))
V, END = len(characters), characters.index("\n")  # of a document, a question, an answer
number = {c: i for i, c in enumerate(characters)}


def encode(text):
    return [number[c] for c in text]


def decode(ids):
    return "".join(characters[i] for i in ids)


# ---- model: a dictionary of weights and one function -----------------------------------------


def weight(*shape):
    return Tensor((0.05 * rng.standard_normal(shape)).astype(np.float32), requires_grad=True)


def ones():
    return Tensor(np.ones(C, np.float32), requires_grad=True)


outer = {"token": weight(V, C), "position": weight(T, C), "norm": ones(), "head": weight(V, C)}
layers = [
    {"norm 1": ones(), "q": weight(C, C), "k": weight(C, C), "v": weight(C, C), "out": weight(C, C),
     "norm 2": ones(), "gate": weight(3 * C, C), "up": weight(3 * C, C), "down": weight(C, 3 * C)}
    for _ in range(L)
]  # fmt: skip
weights = [*outer.values(), *(w for layer in layers for w in layer.values())]


def model(tokens):
    """tokens (B, T) -> logits of the token after each, (B, T, V)."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    x = ops.embedding(tokens, outer["token"]) + ops.embedding(positions, outer["position"])
    for w in layers:
        # attention: every character looks at itself and those before it, by q, what it looks for,
        # k, what it is found by, and v, what it passes on
        n = ops.rms_norm(x, w["norm 1"])
        q, k, v = (ops.split_heads(ops.linear(n, w[each]), H) for each in ("q", "k", "v"))
        x = x + ops.linear(ops.merge_heads(ops.attention(q, k, v)), w["out"])

        # MLP: every character thinks by itself
        n = ops.rms_norm(x, w["norm 2"])
        x = x + ops.linear(ops.swiglu(ops.linear(n, w["gate"]), ops.linear(n, w["up"])), w["down"])
    return ops.linear(ops.rms_norm(x, outer["norm"]), outer["head"])


def answers_to(questions):
    """An answer to each, drawn character by character from what the model holds likely."""
    rows = np.full((len(questions), T), END)
    for row, text in zip(rows, questions):
        row[: len(text)] = encode(text)
    ends = np.array([len(text) for text in questions])
    unfinished = np.arange(len(rows))
    with no_grad():
        while len(unfinished):
            e = ends[unfinished]
            logits = model(rows[unfinished, : e.max()]).data[np.arange(len(e)), e - 1]
            noise = rng.gumbel(size=logits.shape)
            drawn = (logits + noise).argmax(-1)  # Gumbel-max: a draw from softmax
            rows[unfinished, e] = drawn
            ends[unfinished] += 1
            unfinished = unfinished[(drawn != END) & (e + 1 < T)]
    return [decode(row[len(text) : end]) for row, text, end in zip(rows, questions, ends)]


# ---- training: one loop for the three stages -------------------------------------------------


def train(stage, steps, rate, loss):
    """loss() gives a Tensor, down whose gradient every step goes, and a figure to print."""
    moments = [(np.zeros_like(w.data), np.zeros_like(w.data)) for w in weights]
    shown = []
    for step in range(1, steps + 1):
        value, figure = loss()
        value.backward()
        lr = rate * min(step / 20, 1) * (1 - (step - 1) / steps)  # rises for 20 steps, then falls
        for w, (m, v) in zip(weights, moments):
            tinylm.backend.kernels.adamw(
                w.data, w.grad, m, v, lr=lr, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0,
                step=step,
            )  # fmt: skip
            w.grad = None
        shown.append(figure)
        if step * 4 % steps < 4:  # four times in all
            print(f"{stage} {np.mean(shown):7.3f}  (step {step})", flush=True)
            shown.clear()


def test():
    """Four answers, drawn by chance, to each country that no question was ever about."""
    names = np.repeat(never_asked, 4)
    said = answers_to([question(name) for name in names])
    right = np.mean([text in right_answers(name) for name, text in zip(names, said)])
    whole = np.mean([text.startswith("The capital of") for text in said])
    print(f"\nNever asked about: {right:.0%} right, {whole:.0%} in whole sentences.")
    for name, text in list(zip(names, said))[::60]:
        print(f"    Capital of {name}?  {text.strip()}")
    print()


def pretraining():
    """Text, whatever it says: what comes next?"""
    rows = []
    for _ in range(16):
        text = "\n"
        while len(text) <= T:
            text += document(rng.choice(list(facts)))
        rows.append(encode(text[: T + 1]))
    rows = np.array(rows)
    loss = ops.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).mean()
    return loss, loss.item()


def losses_of(questions, answers):
    """−log of the probability of each token of the answers, (B, longest); 0 elsewhere."""
    tokens = np.full((len(answers), T), END)  # what fills up a row comes last: no answer sees it
    targets = np.full_like(tokens, -1)  # −1: nothing is learned from it
    for i, (asked, answer) in enumerate(zip(questions, answers)):
        row = encode(asked + answer)
        tokens[i, : len(row)] = row
        targets[i, len(asked) - 1 : len(row) - 1] = row[len(asked) :]
    longest = max(len(q) + len(a) for q, a in zip(questions, answers))
    return ops.cross_entropy(model(tokens[:, :longest]), targets[:, :longest])


def finetuning():
    """Questions with answers: short ones and whole sentences, as people write them."""
    names = rng.choice(practised, 32)
    answers = [rng.choice(right_answers(name)) for name in names]
    loss = losses_of([question(name) for name in names], answers).sum() / 32
    return loss, loss.item()


def feedback():
    """Its own answers, four to a question: the right ones become likelier (REINFORCE, as RLOO)."""
    names = np.repeat(rng.choice(judged, 16), 4)
    questions = [question(name) for name in names]
    answers = answers_to(questions)
    score = np.array([answer in right_answers(name) for name, answer in zip(names, answers)], float)
    others = (score.reshape(16, 4).sum(1).repeat(4) - score) / 3  # the baseline: their mean
    advantage = (score - others).astype(np.float32)  # above 0: likelier, below: less likely
    return (losses_of(questions, answers) * advantage[:, None]).sum() / 64, score.mean()


train("pre-training, loss of a character", STEPS[0], 5e-3, pretraining)
test()
train("fine-tuning, loss of an answer", STEPS[1], 5e-4, finetuning)
test()
train("feedback, share right", STEPS[2], 3e-4, feedback)
test()
