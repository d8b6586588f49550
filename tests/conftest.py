"""Fixtures: a text, a tiny model, and the backend to run on."""

import os
import sys
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network

import device_arrays
import emulator
import numpy
import pytest
from commands import untrained, write_rows

import tinylm
from tinylm import backend
from tinylm.chat import with_chat_tokens
from tinylm.kernels import CONTRACT, ON_A_DEVICE
from tinylm.kernels.launch import Kernels
from tinylm.tokenizer import train_characters


@pytest.fixture(autouse=True)
def restore_backend():
    """A test may call tinylm.use; the next one starts on the default again."""
    before = backend.name
    yield
    tinylm.use(before)


@pytest.fixture(params=["cpu", "reference"])
def each_backend(request):
    tinylm.use(request.param)
    return request.param


@pytest.fixture
def cuda(monkeypatch) -> Kernels:
    """`--backend cuda`, on the emulator, with arrays that refuse to mix with NumPy's."""
    device = emulator.Emulator(emulator.library(), device_arrays, device_arrays.unwrap)
    kernels, module = Kernels(device), ModuleType("tinylm.kernels.cuda")
    vars(module).update({name: getattr(kernels, name) for name in CONTRACT + ON_A_DEVICE})
    module.xp, module.describe = device_arrays, lambda: "emulator"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tinylm.use("cuda")
    yield kernels
    tinylm.use("reference")  # before the module goes


@pytest.fixture
def float64():
    """The reference backend; tests give it float64 arrays."""
    tinylm.use("reference")


SHAPES = {
    "llama": {"architecture": "llama", "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32},
    "gpt2": {"architecture": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32},
}


@pytest.fixture(params=SHAPES)
def config(request):
    """A small config of each architecture."""
    return tinylm.ModelConfig(
        61, block_size=48, **SHAPES[request.param], bos_token_id=0, eos_token_id=1
    )


@pytest.fixture
def model(config):
    """Random weights, larger than a fresh model's, so that outputs are not all alike."""
    model = tinylm.Transformer(config, 1)
    rng = numpy.random.default_rng(2)
    for p in model.parameters().values():
        p.data = p.data + 0.2 * rng.standard_normal(p.shape, "float32")
    return model


WORDS = "the cat saw a small red bird near an old tree and it sang while we sat under the moon"


@pytest.fixture(scope="session")
def prose() -> str:
    """About 60 kB of sentences made by a seeded generator: no two runs differ, none is copied."""
    rng = numpy.random.default_rng(5)
    words = WORDS.split()
    sentences = []
    for _ in range(1200):
        n = int(rng.integers(5, 14))
        sentence = " ".join(words[i] for i in rng.integers(0, len(words), n))
        sentences.append(sentence.capitalize() + ".")
    return "\n".join(" ".join(sentences[i : i + 6]) for i in range(0, 1200, 6)) + "\n"


@pytest.fixture(scope="session")
def text_file(prose, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose)
    return path


@pytest.fixture(scope="session")
def tokenizer(prose):
    """The prose's characters, and tokens to chat with."""
    return with_chat_tokens(train_characters([prose + "?"]))[0]


@pytest.fixture(scope="session")
def assistant(prose, tmp_path_factory):
    """A directory with a model of random weights that chats, and prompts for it."""
    folder = tmp_path_factory.mktemp("assistant")
    untrained(folder / "sft", prose + "?", 1, 2, 2, 16, 32, 128)
    asked = ["the cat", "a moon?", "red bird near an old tree", "it sang", "small", "sat"]
    write_rows(folder / "prompts", [{"prompt": p} for p in asked])
    return folder
