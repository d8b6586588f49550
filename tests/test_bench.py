"""What bench tells is whole, and the benchmark's PyTorch models are the same models."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from commands import refused, succeeds, write_rows

from tinylm import backend
from tinylm.bench import measure_corpus
from tinylm.kernels.cases import CASES
from tinylm.stages.pretrain import PRESETS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_tokens_around_documents_are_foretold(tmp_path):
    """As preparing the text counts them."""
    write_rows(tmp_path / "rows.jsonl", [{"text": "abc"}, {"text": "de"}, {"text": "f"}])
    (tmp_path / "plain.txt").write_text("no document of its own")
    found = measure_corpus([tmp_path / "rows.jsonl", tmp_path / "plain.txt"])
    assert found["characters"] == 6 + 22 + 2 * 4


def test_bench_foretells_a_run_with_each_preset(text_file):
    found = json.loads(succeeds("bench", "--corpus", text_file, "--json").stdout)
    machine, rows = found["machine"], found["training"]
    assert {row["preset"] for row in rows} == set(PRESETS)
    for row in rows:
        unit = "characters" if "tokenizer" in PRESETS[row["preset"]] else "tokens"
        passes = row["epoch_seconds"] * row["tokens_per_second"]["float32"]
        passes /= 0.9 * found["corpus"][unit]
        assert passes == pytest.approx(1)
    assert found["corpus"]["bytes"] == text_file.stat().st_size
    assert 0 < found["corpus"]["tokens"] < found["corpus"]["bytes"]
    assert machine["barrier_us"] > 0
    for speeds in (machine["fma_gflops"], machine["read_gb_per_s"], machine["copy_gb_per_s"]):
        assert min(speeds["one"], speeds["all"]) > 0
    assert {"linear_backward", "attention_forward", "adamw"} <= {
        row["kernel"] for row in found["kernels"]
    }


def test_bench_prints_tables():
    done = succeeds("bench")
    for shown in ("multiply-adds", "barrier", "linear_cross_entropy", "GB/s", *PRESETS):
        assert shown in done.stdout


def test_bench_needs_the_compiled_kernels():
    refused("bench", "--backend", "reference", saying="use --backend cpu")


@pytest.mark.parametrize("name", ["a", "d"])
def test_pytorch_learns_the_same(benchmark, tmp_path, name):
    """Four steps in two processes, from the same weights: forward, backward and AdamW agree."""
    pytest.importorskip("torch")
    contestants, tasks = benchmark("contestants"), benchmark("tasks")
    ours, theirs = contestants.ours(1)["float32"], contestants.theirs("torch-stock", 1)
    with ours, theirs:
        ours("save", directory=str(tmp_path), shape=tasks.MODELS[name].shape)
        losses = []
        for contestant in (ours, theirs):
            contestant("load", directory=str(tmp_path))
            contestant("learn", model=name)
            for _ in range(4):
                answer = contestant("train", seconds=0)
            losses.append(answer["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_the_gpu_benchmark_measures_and_is_right(benchmark, cuda):
    """On the emulator, whose times mean nothing."""
    shape = {"vocab_size": 61, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}
    gpu = benchmark("gpu")
    found = gpu.measure(2, 1, shape, None, peak=1.0)
    assert {row["dtype"] for row in found["training"]} == {"float32", "bfloat16"}
    assert all(row["loss"] == pytest.approx(4.11, abs=0.05) for row in found["training"])
    assert all(made.row_count for made in gpu.tables(found))


def test_the_gpu_benchmark_times_nothing_that_is_wrong(benchmark, cuda, monkeypatch):
    gpu, few = benchmark("gpu"), [case for case in CASES if "attention: odd" in str(case)]
    monkeypatch.setattr(gpu, "CASES", few)
    monkeypatch.setattr(gpu, "selfcheck", lambda kernels: [])
    assert gpu.wrong_kernels() == []
    backward = backend.kernels.attention_backward
    monkeypatch.setattr(backend.kernels, "attention_backward", lambda **a: backward(**a)[::-1])
    assert gpu.wrong_kernels() == ["attention: odd in bfloat16"]


def test_the_gpu_benchmark_goes_on_where_pytorch_lacks_memory(benchmark):
    gpu, given_back = benchmark("gpu"), []
    theirs = object.__new__(gpu.Theirs)
    theirs.repeats = 1
    theirs.torch = SimpleNamespace(
        OutOfMemoryError=MemoryError,
        cuda=SimpleNamespace(synchronize=int, empty_cache=lambda: given_back.append(1)),
    )

    def too_much():
        raise MemoryError

    assert theirs.time(int) >= 0
    assert numpy.isnan(theirs.time(too_much))
    assert len(given_back) == 2


def test_the_gpu_benchmark_without_a_gpu_is_one_line():
    program = [sys.executable, BENCHMARKS / "gpu.py"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=hidden)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
