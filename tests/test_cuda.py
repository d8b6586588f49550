"""The CUDA kernels without a GPU: the same text and the same launches, on an emulator.

What is left for a machine that has one: `tinylm selfcheck --backend cuda` and benchmarks/gpu.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import device_arrays
import emulator
import numpy as np
import nvrtc
import pytest
from ml_dtypes import bfloat16

from tinylm.kernels import CONTRACT, cases, guarded, launch
from tinylm.kernels.cases import CASES, OPS, Draw, backward, forward, prepared, rounded
from tinylm.selfcheck import FromNumPy

SMALL = [case for case in CASES if not {"large", "deep", "tall"} & set(case.about.split())]
DEVICE = emulator.Emulator(emulator.library(), device_arrays, device_arrays.unwrap)


@pytest.fixture
def kernels():
    with np.errstate(all="ignore"):
        yield FromNumPy(launch.Kernels(DEVICE))
    DEVICE.order("forward")
    DEVICE.leave_out(-1)


def same_bits(a, b):
    return all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


# ---- agreement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_with_reference(case, kernels):
    assert cases.parity_error(kernels, case) <= cases.TOLERANCE["float32"] * case.slack


def test_every_kernel_of_the_contract_is_there(kernels):
    assert not [name for name in CONTRACT if not callable(getattr(launch.Kernels, name, None))]


@pytest.mark.parametrize("case", [c for c in SMALL if c.op in ("attention", "rope")], ids=str)
def test_strides_do_not_change_bits(case):
    """Heads that are slices of a wider projection, as they come from a linear layer."""
    kernels, xp = launch.Kernels(DEVICE), device_arrays
    arguments, expected, dy = prepared(case, "float32")
    results, first = rounded(expected, np.float32), OPS[case.op].returns[0]

    def slices(x):
        B, H, T, D = x.shape
        wide = np.full((B, T, H, D + 3), np.nan, np.float32)
        wide[..., :D] = x.swapaxes(1, 2)
        return xp.asarray(wide)[..., :D].swapaxes(1, 2)

    def run(heads):
        moved = {k: heads(arguments[k]) for k in OPS[case.op].inputs}
        rest = {k: xp.asarray(v) for k, v in arguments.items() if isinstance(v, np.ndarray)}
        back = {k: xp.asarray(v) for k, v in results.items()} | {first: heads(results[first])}
        found = forward(kernels, case, arguments | rest | moved)
        found |= backward(kernels, case, arguments | rest | moved, back, heads(dy))
        return {name: array.get() for name, array in found.items()}

    assert same_bits(run(slices), run(xp.asarray))


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("shape", [(17, 1, 1), (33, 67, 65), (130, 700, 31)], ids=str)
def test_bfloat16_products_round_their_operands_and_nothing_else(
    shape, transpose_a, transpose_b, kernels
):
    (M, K, N), draw = shape, Draw(0)
    a, b = draw(M, K).astype(bfloat16), draw(K, N).astype(bfloat16)
    noise = np.float32(1 + 2.0**-10)  # less than half a step of bfloat16: rounded away
    x, y = np.float32(a) * noise, np.float32(b) * noise
    kernels.kernels.set_products("bfloat16")
    x, y = x.T.copy() if transpose_a else x, y.T.copy() if transpose_b else y
    got = kernels.matmul(a=x, b=y, transpose_a=transpose_a, transpose_b=transpose_b)
    assert cases.distance(got, np.float64(a) @ np.float64(b)) <= 1e-6


def test_rounding_to_bfloat16_is_that_of_ml_dtypes():
    kernels, some = launch.Kernels(DEVICE), Draw(0)(1000).astype(np.float32)
    ties = np.arange(0x3F7F8000, 0x3F820000, 0x2000, np.uint32).view(np.float32)
    edges = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-40, -1e-45])
    x = np.concatenate([some, ties, edges])
    got = kernels.rounded(device_arrays.asarray(x)).get()
    finite = ~np.isnan(x)
    assert np.array_equal(got[finite], x.astype(bfloat16).view(np.uint16)[finite])
    assert np.isnan(got.view(bfloat16)[~finite]).all()


ROUNDED = [c for c in CASES if "linear" in c.op or c.op == "attention"]


@pytest.mark.parametrize("case", [c for c in ROUNDED if c.slack == 1], ids=str)
def test_bfloat16_is_close_to_the_reference(case, kernels):
    kernels.kernels.set_products("bfloat16")
    assert cases.parity_error(kernels, case) <= cases.TOLERANCE["bfloat16"]


def test_the_head_gives_the_same_in_one_block_of_rows_or_several(kernels, monkeypatch):
    case = next(c for c in CASES if str(c) == "linear_cross_entropy: large")
    monkeypatch.setattr(launch, "LOGITS", 100 * 2100)  # 13 blocks
    assert cases.parity_error(kernels, case) <= cases.TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("weights", "targets", "factor"),
    [
        ([0.25] * 4, [0, 1, 2, 0], 1),
        ([7.0, 0.5, 0.5, 7.0], [-1, 1, 2, -1], 1),
        ([-3.0] * 4, [0, -1, 2, -1], -6),
        ([0.0, 9.0, 9.0, 9.0], [-1] * 4, 1),
        ([np.nan, 1.0, np.nan, np.nan], [0, -1, 2, 1], np.nan),
    ],
)
def test_gradients_are_scaled_by_what_the_device_finds(weights, targets, factor):
    kernels, xp = launch.Kernels(DEVICE), device_arrays
    made = [xp.asarray(Draw(0)(2, 3).astype(np.float32)), xp.asarray(f32)]
    expected = [x.get() * np.float32(factor) for x in made]
    targets = xp.asarray(np.int64(targets))
    kernels.scale_evenly(made, xp.asarray(np.float32(weights)), targets)
    kernels.settle()
    assert all(np.array_equal(x.get(), y, equal_nan=True) for x, y in zip(made, expected))


@pytest.mark.parametrize("bad", [None, "loss", "gradient", "token"])
def test_all_parameters_at_once_move_as_one_after_the_other(bad):
    """Of one piece, exactly one, a number more, and one without a gradient."""
    kernels = launch.Kernels(DEVICE)
    shapes = [(1,), (2, guarded.PIECE // 2), (guarded.PIECE + 1,), (5, 8)]

    def tensors():
        local = Draw(1)
        made = [[local(*s), local(*s), local(*s), local(*s) ** 2] for s in shapes]
        return [[device_arrays.asarray(x.astype(np.float32)) for x in tensor] for tensor in made]

    once, each = tensors(), tensors()
    if bad == "gradient":
        once[2][1][guarded.PIECE] = np.inf
    if bad == "token":
        kernels.embedding_forward(device_arrays.asarray([[9]]), device_arrays.asarray(f32))
    once[3][1] = None
    loss = device_arrays.asarray(np.float64(np.nan if bad == "loss" else 1.5))
    rate, decays = device_arrays.asarray(np.float32([0.1])), [0.0, 0.2, 0.0, 0.2]
    sizes = [x.size for x, *_ in once]
    update = kernels.guarded_adamw(sizes, decays, 0.9, 0.99, 1e-8, 50.0, (0.0, 0, 6))
    told = kernels.later(update(loss, rate, once))
    if bad == "token":
        with pytest.raises(ValueError, match=r"\[0, 2\), got 9"):
            told()
    else:
        norm = kernels.global_norm([tensor[1] for tensor in once[:3]])
        assert told()[1:] == (pytest.approx(norm, nan_ok=True), 6 if bad else 7)
    if not bad:
        for (p, g, m, v), decay in zip(each[:3], decays):
            kernels.adamw(p, g, m, v, 0.1, 0.9, 0.99, 1e-8, decay, 7, 50 / (norm + 1e-6))
    for (p, _, m, v), (q, _, n, w) in zip(once, each):
        assert all(np.array_equal(x.get(), y.get()) for x, y in ((p, q), (m, n), (v, w)))


# ---- barriers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_order_of_warps_does_not_change_bits(case, order, kernels):
    expected = cases.run(kernels, case)
    DEVICE.order(order)
    assert same_bits(expected, cases.run(kernels, case))


# which cases come to wait in a file's barriers, where that is not plain from its name
CASES_OF = {
    "device": "softmax",
    "norm": "linear:",
    "cross_entropy": "linear_cross_entropy",
    "attention_bfloat16": "attention",
}


@pytest.mark.parametrize("number", range(len(emulator.barriers())), ids=emulator.barriers())
def test_no_barrier_can_be_missing(number, kernels):
    """Left out, each one shows: so each is needed, and one forgotten would have been seen."""
    file = emulator.barriers()[number].split(".")[0]
    mine = [case for case in SMALL if str(case).startswith(CASES_OF.get(file, file))]
    mine.sort(key=lambda case: case.about != "documents")  # three tiles: most likely to tell
    kernels.kernels.set_products("bfloat16" if "bfloat16" in file else "float32")

    def shows(case):
        arguments, results, dy = prepared(case, "float32")
        expected = cases.run(kernels, case)
        for order in emulator.ORDERS:
            if OPS[case.op].inputs:  # what it leaves in the block's memory must not look right
                backward(kernels, case, arguments, rounded(results, "float32"), np.nan * dy)
            DEVICE.order(order)
            DEVICE.leave_out(number)
            got = cases.run(kernels, case)
            DEVICE.leave_out(-1)
            if not same_bits(expected, got):
                return True
        return False

    assert any(map(shows, mine))


def test_a_barrier_that_not_all_threads_reach_is_named(tmp_path):
    program = tmp_path / "uneven.py"
    program.write_text(
        "import emulator\n"
        'text = """extern "C" __global__ void uneven(float* x) {\n'
        '    if (threadIdx.x < 7) return; __syncthreads(); x[threadIdx.x] = 1; }"""\n'
        "device = emulator.Emulator(emulator.compiled(text))\n"
        'device.launch("uneven", (1,), 64, 0, (emulator.numpy.zeros(64, "float32"),))\n'
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode != 0
    assert "a barrier that not all reach in uneven, block (0, 0, 0): 0:ended" in done.stderr


# ---- numbers that are not numbers --------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in SMALL if "all −1" not in c.about], ids=str)
def test_nan_is_not_swallowed(case, kernels):
    arguments, expected, dy = prepared(case, "float32")
    for name in OPS[case.op].inputs or ("a", "param", "grad"):
        if name in arguments:
            poisoned = arguments | {name: np.full_like(arguments[name], np.nan)}
            results = forward(kernels, case, poisoned)
            assert any(np.isnan(r).any() for r in results.values()), name
    if OPS[case.op].inputs:
        results = rounded(expected, np.float32)
        gradients = backward(kernels, case, arguments, results, np.full_like(dy, np.nan))
        assert all(np.isnan(g).any() for g in gradients.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_number_shows_in_its_row(bad, kernels):
    for at in (0, 7, 36):
        x = Draw(at)(1, 37).astype(np.float32)
        x[0, at] = bad
        zero = np.zeros(1, np.int32)
        assert np.isnan(kernels.softmax_forward(x=x)).any()
        assert not np.isfinite(kernels.cross_entropy_forward(logits=x, targets=zero)[1]).any()
        for approximate in (True, False):
            assert not np.isfinite(kernels.gelu_forward(x=x, approximate=approximate)[0, at])
        assert not np.isfinite(kernels.swiglu_forward(gate=x, up=x)[0, at])
        assert not np.isfinite(kernels.global_norm(arrays=[x]))
        k = np.ones((1, 1, 37, 1), np.float32)
        q = x.reshape(1, 1, 37, 1)
        assert not np.isfinite(kernels.attention_forward(q=q, k=k, v=k)[1][0, 0, at])
        assert not np.isfinite(kernels.attention_forward(q=k, k=q, v=k)[1][0, 0, 36])
        assert not np.isfinite(kernels.attention_forward(q=k, k=k, v=q)[0][0, 0, 36])


def test_empty_arrays(kernels):
    none, weight, tokens = np.ones((0, 3), np.float32), f32, np.zeros(0, np.int32)
    some = np.ones((0, 2), np.float32)
    assert kernels.linear_forward(x=none, weight=weight).shape == (0, 2)
    assert np.array_equal(kernels.matmul(a=none, b=none, transpose_a=True), np.zeros((3, 3)))
    _, dweight, _ = kernels.linear_backward(dy=some, x=none, weight=weight)
    assert np.array_equal(dweight, np.zeros((2, 3)))
    dweight = kernels.embedding_backward(dy=none, tokens=tokens, vocab_size=2)
    assert np.array_equal(dweight, np.zeros((2, 3)))
    norms = kernels.rms_norm_backward(dy=none, x=none, weight=f32[0], rstd=none[:, 0])
    assert np.array_equal(norms[1], np.zeros(3))
    loss, lse = kernels.linear_cross_entropy_forward(x=none, weight=weight, targets=tokens)
    dx, dweight = kernels.linear_cross_entropy_backward(
        dloss=loss, x=none, weight=weight, targets=tokens, lse=lse
    )
    assert loss.shape == (0,)
    assert dx.shape == (0, 3)
    assert np.array_equal(dweight, np.zeros((2, 3)))
    out, lse = kernels.attention_forward(q=heads, k=heads[:, :, :0], v=heads[:, :, :0])
    assert np.all(out == 0)
    assert np.all(lse == -np.inf)
    assert kernels.gelu_forward(x=none).shape == (0, 3)
    assert kernels.global_norm(arrays=[]) == 0


# ---- errors ------------------------------------------------------------------------------------

f32 = np.ones((2, 3), np.float32)
heads = np.ones((2, 4, 5, 8), np.float32)
angles = np.ones((6, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "kernel", "arguments"),
    [
        (TypeError, "[rms_norm_forward] x: expected float32, got float64", "rms_norm_forward", dict(x=np.ones((2, 3)), weight=f32[0], eps=1e-5)),
        (TypeError, "[embedding_forward] tokens: expected int32 or int64, got float32", "embedding_forward", dict(tokens=f32, weight=f32)),
        (ValueError, "[matmul] b: expected (K, N) = (3, any), got (2, 3)", "matmul", dict(a=f32, b=f32)),
        (ValueError, "[rms_norm_forward] weight: expected (C) = (3,), got (2,)", "rms_norm_forward", dict(x=f32, weight=f32[:, 0], eps=1e-5)),
        (ValueError, "[attention_forward] k: expected (B, G, S, D) = (2, any, any, 8), got (2, 4, 5, 7)", "attention_forward", dict(q=heads, k=heads[..., :7], v=heads)),
        (ValueError, "[attention_forward] v: expected (B, G, S, D) = (2, 2, 5, 8), got (2, 4, 5, 8)", "attention_forward", dict(q=heads, k=heads[:, :2], v=heads)),
        (ValueError, "[attention_forward] k: expected G dividing H = 4, got G = 3", "attention_forward", dict(q=heads, k=heads[:, :3], v=heads[:, :3])),
        (ValueError, "[prefix_attention] prefix_k: expected (P, G, S, D) = (any, 2, any, 8), got (2, 4, 5, 8)", "prefix_attention", dict(q=heads, k=heads[:, :2], v=heads[:, :2], prefix_k=heads, prefix_v=heads, prefix=np.array([0, 1]))),
        (ValueError, "[prefix_attention] prefix: expected (B) = (2,), got (1,)", "prefix_attention", dict(q=heads, k=heads, v=heads, prefix_k=heads, prefix_v=heads, prefix=np.array([0]))),
        (ValueError, "[embedding_forward] tokens: expected values in [0, 2), got 2", "embedding_forward", dict(tokens=np.array([0, 2]), weight=f32)),
        (ValueError, "[embedding_forward] tokens: expected values in [0, 2), got -1", "embedding_forward", dict(tokens=np.array([0, -1], np.int32), weight=f32)),
        (ValueError, "[embedding_backward] tokens: expected values in [0, 3), got 2147483647", "embedding_backward", dict(dy=f32, tokens=np.array([0, 1 << 32]), vocab_size=3)),
        (ValueError, "[cross_entropy_forward] targets: expected values in [-1, 3), got 3", "cross_entropy_forward", dict(logits=f32, targets=np.array([0, 3]))),
        (ValueError, "[linear_cross_entropy_forward] targets: expected values in [-1, 2), got -2", "linear_cross_entropy_forward", dict(x=f32, weight=f32, targets=np.array([0, -2]))),
        (ValueError, "[rope_forward] positions: expected values in [0, 6), got 6", "rope_forward", dict(x=heads, cos=angles, sin=angles, positions=np.full((2, 5), 6))),
        (ValueError, "[rope_forward] x: expected an even head size D, got 7", "rope_forward", dict(x=heads[..., :7], cos=f32, sin=f32, positions=np.zeros((2, 5), int))),
        (ValueError, "[adamw] step: expected at least 1, got 0", "adamw", dict(param=f32.copy(), grad=f32, m=f32.copy(), v=f32.copy(), lr=1, beta1=0.9, beta2=0.9, eps=1, weight_decay=0, step=0)),
        (ValueError, "[muon] param: expected (M, N) = (any, any), got (3,)", "muon", dict(matrices=[[f32[0].copy()] * 3], lr=1, beta1=0.9, weight_decay=0)),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(error, message, kernel, arguments, kernels):
    with pytest.raises(error) as raised:
        getattr(kernels, kernel)(**arguments)
    assert message in str(raised.value)
    kernels.kernels.settle()  # told once


def test_an_array_of_the_host_is_refused_by_name():
    kernels = launch.Kernels(DEVICE)
    with pytest.raises(TypeError, match=r"\[add\] x: expected an array on the device, got ndarray"):
        kernels.add(f32, f32)


def test_what_is_written_in_place_must_be_contiguous():
    kernels, x = launch.Kernels(DEVICE), device_arrays.asarray(f32)
    with pytest.raises(ValueError, match=r"\[adamw\] m: expected a C-contiguous array"):
        turned = device_arrays.asarray(f32.T.copy()).T
        kernels.adamw(x.copy(), x, turned, x.copy(), 1, 0.9, 0.9, 1, 0, 1)


def test_products_are_of_two_kinds():
    with pytest.raises(ValueError, match="expected float32 or bfloat16, got int8"):
        launch.Kernels(DEVICE).set_products("int8")


# ---- compilers ---------------------------------------------------------------------------------


def spills(log: str) -> dict[str, int]:
    """Bytes that each kernel stores because it has too few registers, from ptxas -v."""
    found = re.findall(r"Function properties for (\w+)\s+.*?(\d+) bytes spill stores", log)
    return {name: int(size) for name, size in found}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_nvrtc_compiles_it_and_registers_suffice(architecture):
    library = nvrtc.library()
    if library is None:
        pytest.skip("the wheel nvidia-cuda-nvrtc is not installed")
    found = spills(nvrtc.compile(library, launch.source(), architecture))
    assert {"adamw", "attention_forward_bfloat16_64", "matmul"} <= found.keys()
    # a few bytes outside the loops are what ptxas trades for a second block on the processor
    allowed = {name: 64 if name.startswith("attention") else 0 for name in found}
    assert not {name: size for name, size in found.items() if size > allowed[name]}


def test_nvcc_compiles_each_file_alone(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    folder = Path(__file__).parent.parent / "csrc" / "cuda"
    files = sorted(folder.glob("*.cu"))
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-G", "--ptx", "-odir", tmp_path, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
