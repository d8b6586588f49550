"""tinylm/kernels/cuda.py on a pretended machine: what it asks of CuPy and cuBLAS, what it refuses."""

import ctypes
import sys

import fake_cuda
import numpy
import pytest
from commands import SMALL, weights

import tinylm
from tinylm import backend, memory
from tinylm.cli import run
from tinylm.kernels import cases
from tinylm.kernels.cases import CASES
from tinylm.selfcheck import FromNumPy
from tinylm.stages.pretrain import Pretrain


@pytest.fixture
def machine(monkeypatch):
    """A driver, CuPy and cuBLAS; a test takes away what it wants to be missing."""
    real = ctypes.CDLL
    libraries = {"libcuda.so.1": fake_cuda.Driver(), "libcublas.so.13": fake_cuda.Cublas()}

    def load(name, *rest):
        last = str(name).rsplit("/", maxsplit=1)[-1]
        if last in ("libcuda.so.1", "libcublas.so.13"):
            if last not in libraries:
                raise OSError(last)
            return libraries[last]
        return real(name, *rest)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.delitem(sys.modules, "tinylm.kernels.cuda", raising=False)
    for name, module in fake_cuda.cupy().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield libraries
    tinylm.use("reference")
    sys.modules.pop("tinylm.kernels.cuda", None)


PRODUCTS = [case for case in CASES if case.op.startswith(("matmul", "linear"))]
OTHERS = [case for case in CASES if case.about in ("odd", "clipped", "documents", "wide head")]


@pytest.mark.parametrize("case", [c for c in (*PRODUCTS, *OTHERS) if c.slack == 1], ids=str)
def test_parity_through_cupy_and_cublas(case, machine):
    tinylm.use("cuda")
    assert backend.describe() == "cuda (Pretended GPU)"
    kernels = FromNumPy(backend.kernels)
    for dtype in ("float32", "bfloat16"):
        backend.set_products(dtype)
        assert cases.parity_error(kernels, case) <= cases.TOLERANCE[dtype]


def test_a_row_made_by_a_new_axis_is_multiplied(machine):
    """Its stride is not the length of a row, which cuBLAS would refuse."""
    tinylm.use("cuda")
    x, w = (backend.asarray(x) for x in numpy.ones((2, 5, 5), "float32"))
    for a in (x[0][None], backend.xp.expand_dims(x[1], 0)):
        assert backend.kernels.matmul(a, w).tolist() == [[5.0] * 5]


def test_a_recorded_step_is_the_bits_of_one_that_was_asked_for(
    machine, text_file, tmp_path, monkeypatch
):
    """Through CuPy's streams, events, pools and graphs, with cuBLAS in it."""
    text = tmp_path / "prose.txt"
    text.write_text(text_file.read_text()[:4000])
    monkeypatch.setattr("tinylm.stages.pretrain.generate", lambda *_, **__: "")
    fake_cuda.Graph.launches = fake_cuda.MemoryPool.given_back = 0
    for name, recordable in (("replayed", True), ("asked", False)):
        monkeypatch.setattr(Pretrain, "recordable", recordable)
        here = ["--out", tmp_path / name, "--backend", "cuda", "--max-steps", "4"]
        assert run([*map(str, ["pretrain", text, *here, *SMALL, "--eval-tokens", "100"])]) == 0
    assert fake_cuda.Graph.launches == 3  # the first of four is asked for
    backend.kernels.free_bytes()
    assert fake_cuda.MemoryPool.given_back == 1
    assert weights(tmp_path / "replayed") == weights(tmp_path / "asked")


def test_a_full_device_gives_a_graph_what_others_hold_idle(machine):
    """And never what is idle in the graph's own pool: it would be freed under what is recorded."""
    tinylm.use("cuda")
    cuda, calls = sys.modules["cupy"].cuda, []

    class Full(RuntimeError):
        status = cuda.runtime.errorMemoryAllocation = 2

    def memory(size):
        calls.append(size)
        raise Full

    cuda.Memory, cuda.MemoryPointer, idle = (
        memory,
        None,
        sys.modules["cupy"].get_default_memory_pool(),
    )
    pool = sys.modules["tinylm.kernels.cuda"].device.memory()
    with pytest.raises(MemoryError, match="no 1,000 bytes for a graph"):
        pool.allocator(1000)
    assert calls == [1000, 1000]
    assert idle.freed == 1


def test_memory_that_is_free_counts_the_pool(machine):
    tinylm.use("cuda")
    assert memory.available() == 8e9


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("driver", "no NVIDIA driver is installed (libcuda.so.1 not found): install your GPU's driver"),
        ("gpu", "the NVIDIA driver finds no GPU that it can use (cuInit error 100)"),
        ("cupy", "pip install 'tinylm[cuda]'"),
        ("nvrtc", "NVRTC cannot be loaded (no libnvrtc): pip install 'tinylm[cuda]'"),
        ("cublas", "cuBLAS is missing (libcublas.so.13 not found): pip install 'tinylm[cuda]'"),
        ("a newer gpu", "this GPU has compute capability 7.5: 8.0 or more is needed"),
        ("memory", "too little device memory: 0.1 of 8.0 GB are free"),
        ("old driver", "CuPy cannot use the driver, which knows CUDA 13.0 (insufficient)"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(missing, message, machine, monkeypatch):
    def fail(error):
        raise RuntimeError(error)

    cupy = sys.modules["cupy"]
    if missing == "driver":
        del machine["libcuda.so.1"]
    elif missing == "gpu":
        machine["libcuda.so.1"].error = 100
    elif missing == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    elif missing == "nvrtc":
        cupy.cuda.nvrtc.getVersion = lambda: fail("no libnvrtc")
    elif missing == "cublas":
        del machine["libcublas.so.13"]
    elif missing == "a newer gpu":
        cupy.cuda.runtime.getDeviceProperties = lambda i: {"name": b"T4", "major": 7, "minor": 5}
    elif missing == "memory":
        cupy.cuda.runtime.memGetInfo = lambda: (1e8, 8e9)
    else:
        cupy.cuda.runtime.getDeviceCount = lambda: fail("insufficient")
    with pytest.raises(ImportError) as raised:
        tinylm.use("cuda")
    assert message in str(raised.value)
    assert numpy is backend.xp  # the backend before is still in use
