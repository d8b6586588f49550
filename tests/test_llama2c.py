"""Models of llama2.c open, and write what llama2.c writes."""

import struct
from pathlib import Path

import numpy
import pytest

import tinylm
from tinylm.errors import InputError
from tinylm.evaluate import encode_files, evaluate_text
from tinylm.llama2c import load_llama2c

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "stories260K"
DIM, HIDDEN, LAYERS, HEADS, GROUPS, VOCAB, CONTEXT = 16, 24, 2, 4, 2, 270, 12


def write_tokenizer(path):
    pieces = [b"<unk>", b"<s>", b"</s>", *[b"<0x%02X>" % i for i in range(256)]]
    pieces += [b" ", b"a", b"b", b"ab", b" a", b" ab", b"c", b"ca", b"cab", b"\n", b"!"]
    with open(path, "wb") as f:
        f.write(struct.pack("i", max(map(len, pieces))))
        for i, piece in enumerate(pieces):
            f.write(struct.pack("fi", -float(max(0, i - 258)), len(piece)) + piece)


@pytest.fixture
def files(tmp_path):
    """A small random model in llama2.c's format; returns its paths and its weights."""
    rng = numpy.random.default_rng(0)
    D = DIM // HEADS
    shapes = {
        "embedding": (VOCAB, DIM), "norm 1": (LAYERS, DIM), "q": (LAYERS, DIM, DIM),
        "k": (LAYERS, GROUPS * D, DIM), "v": (LAYERS, GROUPS * D, DIM), "o": (LAYERS, DIM, DIM),
        "norm 2": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM), "w2": (LAYERS, DIM, HIDDEN),
        "w3": (LAYERS, HIDDEN, DIM), "norm": (DIM,), "angles": (2, CONTEXT, D // 2),
    }  # fmt: skip
    weights = {k: 0.5 * rng.standard_normal(s, "float32") for k, s in shapes.items()}
    path, words = tmp_path / "m.bin", tmp_path / "t.bin"
    with open(path, "wb") as f:
        f.write(struct.pack("7i", DIM, HIDDEN, LAYERS, HEADS, GROUPS, VOCAB, CONTEXT))
        for values in weights.values():
            f.write(values.tobytes())
    write_tokenizer(words)
    return path, words, weights


def llama2c_forward(w, tokens):
    """The logits of the last token as run.c computes them, token by token, with Python loops."""
    D = DIM // HEADS
    keys, values = [[] for _ in range(LAYERS)], [[] for _ in range(LAYERS)]

    def rmsnorm(x, g):
        return x / numpy.sqrt((x * x).mean() + 1e-5) * g

    def turn(x, at):
        x = x.copy()
        for i in range(0, len(x), 2):
            angle = at / 10000.0 ** ((i % D) / D)
            c, s = numpy.cos(angle), numpy.sin(angle)
            x[i], x[i + 1] = x[i] * c - x[i + 1] * s, x[i] * s + x[i + 1] * c
        return x

    for at, token in enumerate(tokens):
        x = w["embedding"][token].astype(float)
        for layer in range(LAYERS):
            n = rmsnorm(x, w["norm 1"][layer])
            q = turn(w["q"][layer] @ n, at)
            keys[layer].append(turn(w["k"][layer] @ n, at))
            values[layer].append(w["v"][layer] @ n)
            heads = []
            for h in range(HEADS):
                g = h // (HEADS // GROUPS) * D
                s = [q[h * D : h * D + D] @ k[g : g + D] / D**0.5 for k in keys[layer]]
                p = numpy.exp(s - numpy.max(s))
                p /= p.sum()
                heads.append(sum(a * v[g : g + D] for a, v in zip(p, values[layer], strict=True)))
            x = x + w["o"][layer] @ numpy.concatenate(heads)
            n = rmsnorm(x, w["norm 2"][layer])
            gate, up = w["w1"][layer] @ n, w["w3"][layer] @ n
            x = x + w["w2"][layer] @ (gate / (1 + numpy.exp(-gate)) * up)
    return w["embedding"] @ rmsnorm(x, w["norm"])


def test_logits_equal_those_of_run_c(files, each_backend):
    path, words, weights = files
    model, _ = load_llama2c(path, words)
    tokens = [1, 261, 262, 40, 261, 269]
    assert numpy.abs(model(tokens).data[0, -1] - llama2c_forward(weights, tokens)).max() < 1e-4


def test_the_converted_directory_opens_again(files, tmp_path):
    model, tokenizer = load_llama2c(*files[:2])
    tinylm.save(model, tokenizer, tmp_path / "d")
    again, words = tinylm.load(tmp_path / "d")
    assert (again([1, 5]).data == model([1, 5]).data).all()
    assert words.add_bos
    assert words.encode("cab ab!") == tokenizer.encode("cab ab!")


def test_it_is_evaluated_on_documents_that_begin_with_its_own_token(files, tmp_path):
    """With <s>, for it knows no <|begin|>; none sees the one before, nor is <s> predicted."""
    model, tokenizer = load_llama2c(*files[:2])
    (tmp_path / "a.txt").write_text("cab##ab!")
    shard = encode_files(tokenizer, [tmp_path / "a.txt"], "##")
    one, two = ([1, *tokenizer.encode(text), 2] for text in ("cab", "ab!"))
    assert shard.tolist() == one + two
    found = evaluate_text(model, tokenizer, [shard])
    alone = sum(model.loss(ids[:-1], ids[1:]).data.sum() for ids in (one, two))
    assert found["tokens"] == len(shard) - 2
    assert found["loss"] == pytest.approx(alone / found["tokens"], rel=1e-5)


def test_a_file_of_the_wrong_length_is_refused(files):
    path, words, _ = files
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="its header asks for"):
        load_llama2c(path, words)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="not a model of llama2"):
        load_llama2c(path, words)


@pytest.mark.skipif(not REAL.exists(), reason="the stories260K model is not at hand")
def test_stories260k_to_the_letter(each_backend, tmp_path):
    model, tokenizer = load_llama2c(REAL / "stories260K.bin", REAL / "tok512.bin")
    tinylm.save(model, tokenizer, tmp_path)
    model, tokenizer = tinylm.load(tmp_path)
    text = tinylm.generate(model, tokenizer, "", max_new_tokens=200, temperature=0.0)
    assert text == (REAL / "expected_greedy_200.txt").read_text().removesuffix("\n")
