"""The model is the one that `transformers` knows, and the same on every backend."""

import json
from contextlib import nullcontext

import numpy
import pytest

import tinylm
from tinylm import backend
from tinylm.checkpoint import write_tensors
from tinylm.config import from_json
from tinylm.errors import InputError
from tinylm.model import Transformer
from tinylm.optim import AdamW
from tinylm.tokenizer import train_characters

TOKENS = numpy.random.default_rng(0).integers(2, 61, (2, 17))


def theirs(config):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch").manual_seed(0)
    c = config
    shared = {"vocab_size": c.vocab_size, "bos_token_id": 0, "eos_token_id": 1}
    if c.is_llama:
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=c.n_embd, intermediate_size=80, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
                rope_theta=5000.0, rms_norm_eps=1e-5, tie_word_embeddings=False, **shared,
            )
        )  # fmt: skip
    else:
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=48, **shared)
        )
    for p in made.parameters():  # fresh weights are too small to tell a wrong formula
        p.data += 0.1 * p.new_empty(p.shape).normal_()
    return made.eval()


def their_logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_logits_equal_those_of_transformers(config, each_backend, tmp_path):
    hf = theirs(config)
    hf.save_pretrained(tmp_path)
    model, tokenizer = tinylm.load(tmp_path)
    assert tokenizer is None
    assert numpy.abs(model(TOKENS).data - their_logits(hf)).max() <= 1e-4


def test_gradients_equal_those_of_transformers(config, each_backend, tmp_path):
    torch = pytest.importorskip("torch")
    hf = theirs(config)
    hf.save_pretrained(tmp_path)
    model, _ = tinylm.load(tmp_path)
    targets = numpy.roll(TOKENS, -1, 1)
    targets[:, -1] = -1
    model.loss(TOKENS, targets).sum().backward()
    labels = torch.tensor(numpy.where(targets < 0, -100, targets)).reshape(-1)
    logits = hf(torch.tensor(TOKENS)).logits.reshape(-1, config.vocab_size)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    want = {name: p.grad.numpy() for name, p in hf.named_parameters()}
    for name, p in model.parameters().items():
        assert numpy.linalg.norm(p.grad - want[name]) <= 1e-4 * numpy.linalg.norm(want[name]), name


def test_transformers_opens_what_we_save(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    tinylm.save(model, None, tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert numpy.abs(model(TOKENS).data - their_logits(hf)).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_open_as_float32(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    config = tinylm.ModelConfig(61, 2, 4, 2, 32, 80, 48)
    hf = theirs(config).to(getattr(torch, dtype))
    hf.save_pretrained(tmp_path)
    model, _ = tinylm.load(tmp_path)
    assert all(p.dtype == numpy.float32 for p in model.parameters().values())
    assert numpy.abs(model(TOKENS).data - their_logits(hf.float())).max() <= 1e-3


def test_save_and_load_give_the_same_bits(model, tmp_path):
    tinylm.save(model, None, tmp_path)
    again, _ = tinylm.load(tmp_path)
    for name, p in model.parameters().items():
        assert numpy.array_equal(p.data, again.parameters()[name].data), name
    assert again.config == model.config


def test_both_spellings_of_the_rotary_base():
    old = {"model_type": "llama", "vocab_size": 9, "num_hidden_layers": 1, "hidden_size": 8,
           "num_attention_heads": 2, "intermediate_size": 16, "rope_theta": 777.0}  # fmt: skip
    new = {k: v for k, v in old.items() if k != "rope_theta"}
    assert from_json(old | {"rope_scaling": {"type": "default"}}).rope_theta == 777.0
    for kind in ("rope_type", "type"):  # as it was called before
        new["rope_parameters"] = {"rope_theta": 777.0, kind: "default"}
        assert from_json(old).rope_theta == from_json(new).rope_theta == 777.0
    new["rope_scaling"] = new.pop("rope_parameters")  # transformers reads it here too
    assert from_json(new).rope_theta == 777.0
    assert from_json(old).n_kv_head == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("sliding_window", 128),
        ("model_type", "mistral"),
        ("num_hidden_layers", "six"),
        ("num_key_value_heads", 3),
        ("rope_scaling", {"factor": 8}),
        ("rope_theta", "1e4"),
        ("head_dim", 5),
        ("vocab_size", 0),
        ("rope_theta", 0),
        ("rms_norm_eps", float("nan")),
        ("bos_token_id", "<s>"),
        ("eos_token_id", [1, "</s>"]),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(field, value):
    """A model that opens but computes something else is worse than one that does not open."""
    content = {"model_type": "llama", "vocab_size": 9, "num_hidden_layers": 1, "hidden_size": 8,
               "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    named = {"rope_parameters": "rope_type", "num_key_value_heads": "n_kv_head",
             "rope_scaling": "rope_scaling|factor", "head_dim": "head size, not 5",
             "rms_norm_eps": "norm_eps"}  # fmt: skip
    with pytest.raises(InputError, match=named.get(field, field)):
        from_json(content | {field: value})


@pytest.mark.parametrize("wrong", [{"num_key_value_heads": 3}, {"architectures": 5}])
def test_a_config_that_makes_no_model_is_told_with_its_file(wrong, tmp_path):
    tinylm.save(Transformer(tinylm.ModelConfig(9, 1, 2, 2, 8, 16, 8)), None, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(InputError, match=r"config\.json: "):
        tinylm.load(tmp_path)


def test_a_begin_token_outside_the_vocabulary_is_none():
    content = {"model_type": "gpt2", "vocab_size": 9, "n_layer": 1, "n_embd": 8, "n_head": 2}
    for token, known in ((50256, None), (-1, None), (8, 8), (0, 0)):
        assert from_json(content | {"bos_token_id": token}).bos_token_id == known


def test_a_head_that_is_not_the_table_it_is_tied_to_is_refused(tmp_path):
    model = Transformer(tinylm.ModelConfig(9, 1, 2, 2, 8, 16, 8))
    tinylm.save(model, None, tmp_path)
    table = model.embedding.weight.data
    for head, fits in ((table, True), (table + 1, False)):
        tensors = {name: p.data for name, p in model.parameters().items()}
        write_tensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": head}, {})
        with nullcontext() if fits else pytest.raises(InputError, match=r"lm_head\.weight is not"):
            tinylm.load(tmp_path)


def test_documents_in_one_row_do_not_see_each_other(model):
    """Two documents packed into a row give what each gives alone."""
    a, b = TOKENS[0, :7], TOKENS[1, :9]
    start = numpy.array([[0] * 7 + [7] * 9], numpy.int32)
    packed = model(numpy.concatenate([a, b])[None], start).data[0]
    assert numpy.abs(packed[:7] - model(a).data[0]).max() < 1e-5
    assert numpy.abs(packed[7:] - model(b).data[0]).max() < 1e-5


def test_loss_ignores_masked_targets(model):
    targets = numpy.roll(TOKENS, -1, 1)
    targets[:, ::2] = -1
    loss = model.loss(TOKENS, targets).data
    assert loss.shape == TOKENS.shape
    assert (loss[:, ::2] == 0).all()
    assert (loss[:, 1::2] > 0).all()


def test_tied_weights_appear_once():
    config = tinylm.ModelConfig(61, 1, 2, 2, 16, 32, 8, tie_embeddings=True)
    assert "lm_head.weight" not in Transformer(config).parameters()
    config = tinylm.ModelConfig(61, 1, 2, 2, 16, 32, 8, tie_embeddings=False)
    assert "lm_head.weight" in Transformer(config).parameters()


def formula_weights(model):
    """Weights that need no file: sines of the index, scaled as a fresh model's."""
    for k, p in enumerate(model.parameters().values()):
        index = numpy.arange(p.size, dtype=numpy.float64).reshape(p.shape)
        wave = numpy.sin(0.7 * index + k)
        values = 1 + 0.02 * wave if p.ndim == 1 and k else 0.08 * wave
        p.data = backend.asarray(values.astype(numpy.float32))


# Ten losses of ten AdamW steps from formula_weights, computed once by the reference kernels in
# float64. They pin the whole of forward, backward and optimizer, on every backend.
LOSSES = {
    "llama": [
        4.146739,
        4.223045,
        4.092584,
        3.990732,
        3.872701,
        3.821992,
        3.801371,
        3.73214,
        3.506481,
        3.462454,
    ],
    "gpt2": [
        4.793351,
        4.610572,
        4.589314,
        4.310645,
        4.251483,
        4.239966,
        4.19316,
        4.129753,
        4.147216,
        4.140174,
    ],
}


def ten_losses(config, dtype="float32"):
    model = Transformer(config)
    formula_weights(model)
    for p in model.parameters().values():
        p.data = p.data.astype(dtype)
    optimizer = AdamW(model.parameters())
    losses = []
    for step in range(10):
        tokens = (numpy.arange(2 * 24).reshape(2, 24) * 7 + step) % config.vocab_size
        targets = (tokens * 3 + 1) % config.vocab_size
        loss = model.loss(tokens, targets).mean()
        loss.backward()
        optimizer.step(1e-2)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_first_ten_losses(config, each_backend):
    want = LOSSES[config.architecture]
    assert numpy.abs(numpy.array(ten_losses(config)) - want).max() <= 1e-4


@pytest.mark.parametrize(
    ("tokens", "targets", "saying"),
    [
        ([[1, 2], [3]], [[1, 2], [3, 4]], "tokens: the rows are not all of one length"),
        ([[1, 2]], [[1], [2, 3]], "targets: the rows are not all of one length"),
        ([], [], "tokens: expected .* with something in it"),
        ([[[1, 2]]], [[1, 2]], r"tokens: expected .*\(1, 1, 2\)"),
        ([[1.0, 2.0]], [[1, 2]], "tokens: expected whole numbers, got float64"),
        ("abc", [[1, 2, 3]], "tokens: expected whole numbers"),
        ([[1, 2]], [[1]], r"targets: expected \(B, T\) = \(1, 2\), got \(1, 1\)"),
        ([[1, -1]], [[1, 2]], "expected values in .*got -1"),
        ([[1, 2]], [[1, -2]], "expected values in .*got -2"),
        ([[1, 2]], [[1, 10**6]], "expected values in .*got 1000000"),
    ],
)
def test_what_are_no_rows_of_tokens_is_told(tokens, targets, saying, model, each_backend):
    with pytest.raises((ValueError, TypeError), match=saying):
        model.loss(tokens, targets)


def test_other_mistakes_are_told_by_name(model):
    with pytest.raises(InputError, match="no reward model"):
        model.scores([[1, 2]], [1])
    with pytest.raises(InputError, match="n_layer: expected a whole number, got"):
        tinylm.ModelConfig(10, n_layer=1.5)
    with pytest.raises(InputError, match="n: expected at least 1, got -1"):
        tinylm.fill(model, None, "a ___ b", n=-1)
    tokenizer = train_characters(["abc"])
    for text in (None, [1, 2], b"abc"):
        with pytest.raises(TypeError, match="text: expected a str, got"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    ("more", "stops"),
    [(None, [3]), (5, [3, 5]), ([3, 7, 5, 7], [3, 7, 5]), ([50256, "x"], [3])],
)
def test_it_stops_where_generation_config_says_too(more, stops, model, tmp_path):
    model.config.eos_token_id = 3
    tinylm.save(model, None, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
    assert tinylm.load(tmp_path)[0].config.stop_ids == stops
