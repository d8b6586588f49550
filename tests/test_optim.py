"""Muon: what it does to a matrix, that it learns, that it resumes to the same bits."""

import json

import numpy
import pytest
from commands import succeeds
from numpy.linalg import norm, svd

from tinylm import backend
from tinylm.checkpoint import Checkpoint
from tinylm.model import Transformer
from tinylm.optim import Muon
from tinylm.stages.feedback import FeedbackConfig
from tinylm.stages.pretrain import PretrainConfig
from tinylm.stages.sft import SFTConfig
from tinylm.tensor import Tensor
from tinylm.train import make_optimizer


def orthogonal(*gradients) -> list:
    """What Muon takes off weights of 0 for gradients of one shape, as large as they make it."""
    size = 0.2 * max(gradients[0].shape) ** 0.5
    matrices = [(numpy.zeros_like(x), x, numpy.zeros_like(x)) for x in gradients]
    backend.kernels.muon(matrices, lr=1 / size, beta1=0.0, weight_decay=0.1)
    return [-weight for weight, *_ in matrices]


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6), (1, 5)])
def test_orthogonalising_keeps_directions_and_evens_out_their_lengths(float64, shape):
    rng = numpy.random.default_rng(0)
    u, _, vt = svd(rng.standard_normal(shape), full_matrices=False)
    s = numpy.geomspace(1, 0.02, min(shape)) * 300
    x = u * s @ vt
    core = u.T @ orthogonal(x)[0] @ vt.T
    lengths = numpy.diag(core)
    assert norm(core - numpy.diag(lengths)) < 1e-9  # U and V are what they were
    assert 0.6 < lengths.min() <= lengths.max() < 1.25
    small, zero, alone = orthogonal(1e-3 * x, 0 * x, x)
    assert norm(small - alone) < 1e-6  # its size does not matter
    assert not zero.any()
    assert numpy.array_equal(orthogonal(x)[0], alone)  # nor who stands beside it


def test_muon_learns_the_weak_directions_too(float64):
    """Least squares, where some inputs are a hundred times weaker than others."""
    rng = numpy.random.default_rng(0)
    x = rng.standard_normal((64, 6)) * numpy.geomspace(1, 0.01, 6)
    answer = rng.standard_normal((6, 4))
    w = Tensor(numpy.zeros((6, 4)), requires_grad=True)
    optimizer = Muon({"w": w}, {"w"}, weight_decay=0.0)
    for i in range(400):
        w.grad = x.T @ (x @ (w.data - answer))
        optimizer.step(0.2 * (1 - i / 400))
    assert norm(w.data - answer) < 0.05 * norm(answer)


def steps(model, optimizer, seeds) -> None:
    for seed in seeds:
        tokens = numpy.random.default_rng(seed).integers(0, 61, (2, 17))
        model.loss(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        optimizer.step(0.01)
        optimizer.zero_grad()


def test_a_checkpoint_continues_muon_to_the_same_bits(config, tmp_path):
    made = []
    for _ in range(2):
        model = Transformer(config, 0)
        made.append((model, Muon(model.parameters(), model.block_matrices())))
    (model, optimizer), (other, resumed) = made
    steps(model, optimizer, range(3))
    kept = Checkpoint(tmp_path)
    kept.save(model, optimizer, {})
    kept.restore(other, resumed)
    resumed.steps = optimizer.steps
    steps(model, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    for name, p in model.parameters().items():
        assert p.data.tobytes() == other.parameters()[name].data.tobytes(), name


def test_muon_moves_the_matrices_of_the_blocks_with_one_moment(config):
    model = Transformer(config, 0)
    optimizer = Muon(model.parameters(), model.block_matrices())
    before = {name: p.data.copy() for name, p in model.parameters().items()}
    steps(model, optimizer, range(1))
    for name, p in model.parameters().items():
        inside = p.ndim == 2 and (".layers." in name or ".h." in name)
        assert (name in optimizer.v) != inside
        if inside:
            size = norm(p.data - 0.999 * before[name]) / max(p.shape) ** 0.5
            assert 0.6 < size / (0.01 * 0.2 * min(p.shape) ** 0.5) < 1.25, name


@pytest.mark.parametrize("stage", [PretrainConfig, SFTConfig, FeedbackConfig])
def test_every_stage_can_train_with_muon(model, stage):
    made = make_optimizer(model, stage(optimizer="muon", beta1=0.5))
    assert isinstance(made, Muon)
    assert made.beta1 == 0.5
    assert not isinstance(make_optimizer(model, stage()), Muon)


def test_the_preset_trains_with_muon_and_resumes(text_file, tmp_path):
    arguments = ["pretrain", text_file, "--out", tmp_path / "r", "--max-steps", "2"]
    succeeds(*arguments, "--preset", "shakespeare")
    assert Checkpoint(tmp_path / "r").state()["config"]["optimizer"] == "muon"
    again = succeeds(*arguments[:-1], "3", "--resume", "--json")
    assert json.loads(again.stdout)["steps"] == 3
