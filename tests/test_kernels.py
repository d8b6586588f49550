"""The kernels: the reference against finite differences, the C++ module against the reference.

What must also hold: the same bits for any number of threads and any strides, no NaN swallowed, no
read out of bounds, errors that say what was expected, and a life after fork.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tinylm.kernels import CONTRACT, _cpu, cases, reference
from tinylm.kernels.cases import CASES, OPS, Draw, backward, forward, prepared, rounded, run

DEFAULT_ISA, DEFAULT_THREADS = _cpu.isa(), _cpu.threads()
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_isa = pytest.mark.parametrize("isa", _cpu.isas())


@pytest.fixture(autouse=True)
def defaults_afterwards():
    with np.errstate(all="ignore"):
        yield
    _cpu.set_products("float32")
    _cpu.use_isa(DEFAULT_ISA)
    _cpu.set_threads(DEFAULT_THREADS)


def same_bits(a, b):
    return all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


def leave_nan_in_memory():
    """What a kernel has not written may be anything: its memory is what others have given back."""
    sizes = [2**e * quarters // 4 for e in range(4, 17) for quarters in (5, 6, 7, 8)]
    arrays = [_cpu.empty([n]) for n in sizes for _ in range(4)]
    for array in arrays:
        array.fill(np.nan)


# ---- agreement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.smooth and OPS[c.op].inputs], ids=str)
def test_reference_gradients_are_finite_differences(case):
    assert cases.gradient_error(case) <= cases.GRADIENT_TOLERANCE


def test_a_gradient_that_is_nan_is_infinitely_wrong(monkeypatch):
    case = next(case for case in CASES if case.op == "gelu" and case.smooth)
    arguments, expected, dy = cases.prepared(case, "float64")
    wrong = expected | {"dx": np.nan * expected["dx"]}
    monkeypatch.setattr(cases, "prepared", lambda *_: (arguments, wrong, dy))
    assert cases.gradient_error(case) == np.inf


@every_isa
@every_case
def test_parity_with_reference(case, isa):
    _cpu.use_isa(isa)
    leave_nan_in_memory()
    assert cases.parity_error(_cpu, case) <= cases.TOLERANCE["float32"] * case.slack


@every_isa
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("shape", [(257, 67, 97), (130, 2000, 310), (4001, 40, 70)], ids=str)
def test_a_float32_product_keeps_all_bits_of_its_operands(shape, transpose_a, transpose_b, isa):
    M, K, N = shape
    draw = Draw(0)
    x = np.float32(draw(M, K) * 2.0 ** draw.ints(-30, 30, M, K))
    y, eye = np.float32(draw(K, N)), np.eye(K, N, dtype=np.float32)

    def multiply(a, b):
        a, b = a.T.copy() if transpose_a else a, b.T.copy() if transpose_b else b
        return _cpu.matmul(a, b, transpose_a, transpose_b)

    _cpu.use_isa(isa)
    whole = multiply(x, eye)  # sums of one term
    assert np.array_equal(whole[:, :K], x[:, :N]) and not whole[:, K:].any()
    assert np.array_equal(multiply(eye.T, x.T), whole.T)
    results = []
    for n in (1, 2, 3):
        _cpu.set_threads(n)
        results.append(multiply(x, y))
    assert all(result.tobytes() == results[0].tobytes() for result in results)
    error = results[0] - np.float64(x) @ y
    assert np.sqrt(np.mean((error / (np.abs(np.float64(x)) @ np.abs(y))) ** 2)) <= 2.0**-23


@every_case
def test_reference_keeps_float32(case):
    for name, result in run(reference, case).items():
        assert isinstance(result, float) or result.dtype == np.float32, name


def test_every_kernel_of_the_contract_has_cases_and_is_built():
    have = {f"{op}{half}" for op in OPS for half in ("", "_forward", "_backward")}
    assert set(CONTRACT) <= have
    assert {case.op for case in CASES} == set(OPS)
    assert all(hasattr(_cpu, name) and hasattr(reference, name) for name in CONTRACT)


def test_parity_never_passes_nan():
    assert cases.distance([np.nan], [1.0]) == np.inf
    assert cases.distance([np.nan], [np.nan]) == np.inf
    assert cases.distance([-np.inf, 1.0], [-np.inf, 1.0]) == 0


# ---- bfloat16 ----------------------------------------------------------------------------------

BFLOAT16 = [isa for isa in _cpu.isas() if isa in ("avx512bf16", "amx")]
every_bfloat16 = pytest.mark.parametrize("isa", BFLOAT16)


def in_bfloat16(isa):
    _cpu.use_isa(isa)
    _cpu.set_products("bfloat16")


@every_bfloat16
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize(
    "shape", [(17, 1, 1), (100, 7, 5), (33, 67, 65), (130, 2000, 310), (4001, 40, 70)], ids=str
)
def test_bfloat16_products_round_their_operands_and_nothing_else(
    shape, transpose_a, transpose_b, isa
):
    M, K, N = shape
    draw = Draw(0)
    a, b = draw(M, K).astype(bfloat16), draw(K, N).astype(bfloat16)
    noise = np.float32(1 + 2.0**-10)  # less than half a step of bfloat16: rounded away
    x, y = np.float32(a) * noise, np.float32(b) * noise
    in_bfloat16(isa)
    x, y = x.T.copy() if transpose_a else x, y.T.copy() if transpose_b else y
    results = []
    for n in (1, 2, 3):
        _cpu.set_threads(n)
        results.append(_cpu.matmul(x, y, transpose_a, transpose_b))
    assert cases.distance(results[0], np.float64(a) @ np.float64(b)) <= 1e-6
    assert all(result.tobytes() == results[0].tobytes() for result in results)


ROUNDED = [c for c in CASES if ("linear" in c.op or c.op == "attention") and c.slack == 1]


@every_bfloat16
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_bfloat16_is_close_to_the_reference_on_any_number_of_threads(case, isa):
    in_bfloat16(isa)
    leave_nan_in_memory()
    assert cases.parity_error(_cpu, case) <= cases.TOLERANCE["bfloat16"]
    _cpu.set_threads(1)
    expected = run(_cpu, case)
    for n in (2, 3, 5):
        _cpu.set_threads(n)
        assert same_bits(expected, run(_cpu, case)), f"{n} threads"


@every_bfloat16
def test_bfloat16_attention_differs_from_float32(isa):
    (case,) = [c for c in CASES if str(c) == "attention: large"]
    exact = run(_cpu, case)
    in_bfloat16(isa)
    assert not any(same_bits({k: exact[k]}, {k: x}) for k, x in run(_cpu, case).items())


@every_bfloat16
def test_bfloat16_attention_has_heads_of_any_width(isa):
    in_bfloat16(isa)
    for D in (1, 2, 31, 33, 96, 257, 300):
        arguments = lambda d, D=D: d.attention(1, 2, 1, 37, 41, D)
        case = cases.Case("attention", f"{D} wide", arguments)
        assert cases.parity_error(_cpu, case) <= cases.TOLERANCE["bfloat16"], D


def test_bfloat16_is_refused_where_the_processor_lacks_it():
    _cpu.use_isa("baseline")
    with pytest.raises(
        ValueError, match="needs the instruction set avx512bf16; in use is baseline"
    ):
        _cpu.set_products("bfloat16")
    with pytest.raises(ValueError, match="float32 or bfloat16, got int8"):
        _cpu.set_products("int8")


# ---- few rows ----------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M", [1, 3, 4, 7, 16])
def test_few_rows_by_weights_of_any_shape(M, transposed, isa):
    _cpu.use_isa(isa)
    draw = Draw(M)
    for C, F in itertools.product((1, 7, 8, 19, 130), (1, 15, 33, 100)):
        x, bias, weight = (draw(*s).astype(np.float32) for s in ((M, C), (F,), (F, C)))
        expected = np.float64(x) @ np.float64(weight).T + bias
        weight = weight.T.copy() if transposed else weight
        for n in (1, 3):
            _cpu.set_threads(n)
            got = _cpu.linear_forward(x, weight, bias, transposed)
            assert cases.distance(got, expected) <= cases.TOLERANCE["float32"], (C, F, n)


# ---- the same bits -----------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(17, 96, 256), (64, 1000, 130), (40, 3, 3), (300, 800, 3100)])
def test_weights_that_are_packed_once_change_no_bit(shape, transposed, isa):
    _cpu.use_isa(isa)
    M, C, F = shape
    draw = Draw(0)
    x, bias = draw(M, C).astype(np.float32), draw(F).astype(np.float32)
    weight = draw(C, F).T.astype(np.float32).T if transposed else draw(F, C).astype(np.float32)
    expected = _cpu.linear_forward(x, weight, bias, transposed)
    for n in (1, 2, 3):
        _cpu.set_threads(n)
        packed = _cpu.PackedWeights(M)
        for _ in range(2):  # the first packs, the second finds
            with packed:
                assert np.array_equal(expected, _cpu.linear_forward(x, weight, bias, transposed))


@every_bfloat16
def test_one_row_by_packed_weights_has_operands_in_bfloat16(isa):
    draw = Draw(0)
    x, weight = draw(1, 384).astype(np.float32), draw(1024, 384).astype(np.float32)
    in_bfloat16(isa)
    with _cpu.PackedWeights(1):
        y = _cpu.linear_forward(x, weight)
    rounded = np.float64(x.astype(bfloat16)) @ np.float64(weight.astype(bfloat16)).T
    assert cases.distance(y, rounded) <= 1e-6


def test_packed_weights_count_only_where_they_are_entered():
    draw = Draw(0)
    x, weight = draw(32, 48).astype(np.float32), draw(64, 48).astype(np.float32)
    packed = _cpu.PackedWeights(32)
    with packed:
        before = _cpu.linear_forward(x, weight)
    weight *= 2
    assert np.array_equal(_cpu.linear_forward(x, weight), 2 * before)
    with packed:  # what nobody may do: it still has the old ones
        assert np.array_equal(_cpu.linear_forward(x, weight), before)
        with _cpu.PackedWeights(32), ThreadPoolExecutor(1) as other:
            assert np.array_equal(_cpu.linear_forward(x, weight), 2 * before)
            elsewhere = other.submit(_cpu.linear_forward, x, weight).result()
        assert np.array_equal(elsewhere, 2 * before)
        for _ in range(20):  # a weight that is gone leaves nothing behind for another
            other = draw(64, 48).astype(np.float32)
            assert cases.distance(_cpu.linear_forward(x, other), x @ other.T) <= 1e-5
            del other


@every_isa
@every_case
def test_threads_do_not_change_bits(case, isa):
    _cpu.use_isa(isa)
    _cpu.set_threads(1)
    expected = run(_cpu, case)
    for n in (2, 3, 5):
        _cpu.set_threads(n)
        assert same_bits(expected, run(_cpu, case)), f"{n} threads"


def strided_copies(x):
    """The same (B, H, T, D) values with other strides; D stays contiguous."""
    B, H, T, D = x.shape
    merged = np.full((B, T, H, D + 3), np.nan, x.dtype)  # a slice of a wider projection
    merged[..., :D] = x.swapaxes(1, 2)
    cache = np.full((B, H, T + 5, D), np.nan, x.dtype)  # a key/value cache, partly filled
    cache[:, :, :T] = x
    return merged[..., :D].swapaxes(1, 2), cache[:, :, :T], x[:, :, ::-1].copy()[:, :, ::-1]


@every_isa
@pytest.mark.parametrize("case", [c for c in CASES if c.op in ("attention", "rope")], ids=str)
def test_strides_do_not_change_bits(case, isa):
    _cpu.use_isa(isa)
    arguments, expected, dy = prepared(case, "float32")
    results = rounded(expected, np.float32)
    want = forward(_cpu, case, arguments) | backward(_cpu, case, arguments, results, dy)
    first = OPS[case.op].returns[0]
    for i in range(3):
        moved = {k: strided_copies(arguments[k])[i] for k in OPS[case.op].inputs}
        back = results | {first: strided_copies(results[first])[i]}
        got = forward(_cpu, case, arguments | moved)
        got |= backward(_cpu, case, arguments | moved, back, strided_copies(dy)[i])
        assert same_bits(want, got)


@every_isa
@pytest.mark.parametrize("case", [c for c in CASES if c.op == "prefix_attention"], ids=str)
def test_a_prefix_gives_the_bits_of_the_same_keys_in_one_piece(case, isa):
    _cpu.use_isa(isa)
    arguments, _, _ = prepared(case, "float32")
    rows, whole = arguments["prefix"], {"q": arguments["q"]}
    for name in ("k", "v"):
        parts = [arguments[f"prefix_{name}"][rows], arguments[name]]
        whole[name] = np.concatenate(parts, 2)
    out, _ = _cpu.attention_forward(**whole, start=arguments.get("start"))
    for i in range(3):
        moved = {k: strided_copies(x)[i] for k, x in arguments.items() if x.ndim == 4}
        assert same_bits({"out": out}, forward(_cpu, case, arguments | moved))


def test_other_kernels_copy_what_is_not_contiguous():
    x, weight = Draw(0)(12, 10).astype(np.float32), np.ones(6, np.float32)
    view = x.T[::2, ::2]
    for got, want in zip(
        _cpu.rms_norm_forward(view, weight, 1e-5),
        _cpu.rms_norm_forward(view.copy(), weight, 1e-5),
    ):
        assert got.tobytes() == want.tobytes()
    assert _cpu.matmul(view, view.T).tobytes() == _cpu.matmul(view.copy(), view.T.copy()).tobytes()


def test_heads_merge_without_a_copy():
    q = np.ones((2, 3, 5, 8), np.float32)
    out, lse = _cpu.attention_forward(q, q, q)
    turned = _cpu.rope_forward(q, *np.ones((2, 9, 4), np.float32), np.zeros((2, 5), np.int64))
    for x in (out, turned, *_cpu.attention_backward(q, q, q, q, out, lse)):
        assert np.shares_memory(x, x.swapaxes(1, 2).reshape(2, 5, 24))


def test_gradients_of_heads_lie_side_by_side_where_the_heads_do():
    qkv, dout = (Draw(i)(2, 5, n).astype(np.float32) for i, n in enumerate((3 * 12, 12)))
    heads = lambda x: x.reshape(2, 5, 3, 4).swapaxes(1, 2)
    q, k, v = map(heads, np.split(qkv, 3, axis=-1))
    out, lse = _cpu.attention_forward(q, k, v)
    beside = _cpu.attention_backward(heads(dout), q, k, v, out, lse)
    base = beside[0].base
    assert base.shape == qkv.shape and all(x.base is base for x in beside)
    apart = _cpu.attention_backward(heads(dout), *(x.copy() for x in (q, k, v)), out, lse)
    assert all(x.base is not apart[0].base for x in apart[1:])
    for x, want, columns in zip(beside, apart, np.split(base, 3, axis=-1)):
        assert np.array_equal(x, want) and np.array_equal(heads(columns), want)
    out, lse = _cpu.attention_forward(v, k, q)
    turned = _cpu.attention_backward(heads(dout), v, k, q, out, lse)
    assert all(x.base is not turned[0].base for x in turned[1:])


def test_an_embedding_adds_to_what_is_there():
    dy, tokens = Draw(0)(2, 3, 5).astype(np.float32), np.array([[0, 2, 2], [3, 0, 2]])
    alone, total = _cpu.embedding_backward(dy, tokens, 7), np.ones((7, 5), np.float32)
    assert np.shares_memory(total, _cpu.embedding_backward(dy, tokens, 7, total))
    assert np.array_equal(total, 1 + alone)


def test_gradients_are_written_over_what_nobody_needs():
    """A training step has no memory for both: of GPT-2's widest activations it saves one."""
    x, dy, weight = (Draw(i)(6, 6).astype(np.float32) for i in range(3))
    assert np.shares_memory(dy, _cpu.gelu_backward(dy, x, dx=dy))
    assert np.shares_memory(dy, _cpu.swiglu_backward(dy, x, x, dgate=dy)[0])
    assert np.shares_memory(x, _cpu.linear_backward(dy, x, weight, dx=x)[0])


def test_integers_of_both_widths_mean_the_same():
    tokens, weight = np.array([[0, 2], [1, 2]]), np.ones((3, 4), np.float32).cumsum(0)
    for dtype in (np.int32, np.int64):
        y = _cpu.embedding_forward(tokens.astype(dtype), weight.astype(np.float32))
        assert np.array_equal(y, weight[tokens])
    assert np.array_equal(_cpu.embedding_forward(tokens.T[::-1], weight), weight[tokens.T[::-1]])


# ---- numbers that are not numbers --------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("case", [c for c in CASES if "all −1" not in c.about], ids=str)
def test_nan_is_not_swallowed(case, isa):
    _cpu.use_isa(isa)
    arguments, expected, dy = prepared(case, "float32")
    for name in OPS[case.op].inputs or ("a", "param", "grad"):
        if name not in arguments or "large" in case.about:
            continue
        poisoned = arguments | {name: np.full_like(arguments[name], np.nan)}
        results = forward(_cpu, case, poisoned)
        assert any(np.isnan(r).any() for r in results.values()), name
    if OPS[case.op].inputs:
        results = rounded(expected, np.float32)
        gradients = backward(_cpu, case, arguments, results, np.full_like(dy, np.nan))
        assert all(np.isnan(g).any() for g in gradients.values())


@every_isa
def test_nan_in_a_gradient_spoils_its_own_matrix_alone(isa):
    _cpu.use_isa(isa)
    matrices = [[np.float32(Draw(i)(40, 30)) for i in range(3)] for _ in range(2)]
    matrices[0][1][0, 0] = np.nan
    _cpu.muon(matrices, 1e-2, 0.9, 0.1)
    assert np.isnan(matrices[0][0]).all()
    assert np.isfinite(matrices[1][0]).all()


@pytest.mark.parametrize(
    ("isa", "dtype"), [(i, "float32") for i in _cpu.isas()] + [(i, "bfloat16") for i in BFLOAT16]
)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex)
def test_a_nan_of_any_bits_shows_in_a_product(bits, dtype, isa):
    _cpu.use_isa(isa)
    _cpu.set_products(dtype)
    x, y = np.ones((130, 96), np.float32), np.ones((96, 100), np.float32)
    x.view(np.uint32)[7, 5] = bits
    for a, b in ((x, y), (y.T, x.T)):
        for transpose_a, transpose_b in itertools.product((False, True), repeat=2):
            left, right = a.T.copy() if transpose_a else a, b.T.copy() if transpose_b else b
            c = _cpu.matmul(left, right, transpose_a, transpose_b)
            c = c if a is x else c.T
            assert np.isnan(c[7]).all() and np.isnan(c).sum() == 100


@every_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_number_shows_in_its_row(bad, isa):
    _cpu.use_isa(isa)
    targets = np.zeros(1, np.int32)
    for at in range(37):
        x = Draw(at)(1, 37).astype(np.float32)
        x[0, at] = bad
        assert np.isnan(_cpu.softmax_forward(x)).any()
        assert not np.isfinite(_cpu.cross_entropy_forward(x, targets)[1]).any()
        assert not np.isfinite(_cpu.gelu_forward(x)[0, at])
        assert not np.isfinite(_cpu.gelu_forward(x, False)[0, at])
        assert not np.isfinite(_cpu.swiglu_forward(x, x)[0, at])
        assert not np.isfinite(_cpu.global_norm([x]))
        k = np.ones((1, 1, 37, 1), np.float32)
        q, v = x.reshape(1, 1, 37, 1), np.ones_like(k)
        assert not np.isfinite(_cpu.attention_forward(q, k, v)[1][0, 0, at])
        assert not np.isfinite(_cpu.attention_forward(k, q, v)[1][0, 0, 36])
        assert not np.isfinite(_cpu.attention_forward(k, k, q)[0][0, 0, 36])


@every_isa
def test_a_query_that_sees_nothing_gives_zero(isa):
    _cpu.use_isa(isa)
    d = Draw(0)
    q, k, dout = (d(2, 4, n, 8).astype(np.float32) for n in (6, 4, 6))
    start = np.array([[0, 0, 0, 0, 0, 0], [9, 9, 9, 2, 2, 9]], np.int32)
    out, lse = _cpu.attention_forward(q, k, k, start)
    # query t sees the keys start .. t - 2
    blind = np.array([[t - 2 < max(s, 0) for t, s in enumerate(row)] for row in start])
    for b, t in zip(*np.nonzero(blind)):
        assert np.all(out[b, :, t] == 0) and np.all(lse[b, :, t] == -np.inf)
    gradients = _cpu.attention_backward(dout, q, k, k, out, lse, start)
    assert all(np.isfinite(g).all() for g in gradients)
    assert all(np.all(gradients[0][b, :, t] == 0) for b, t in zip(*np.nonzero(blind)))


def test_masked_targets_give_exact_zeros():
    d = Draw(0)
    logits, targets = d(4, 9).astype(np.float32), np.array([3, -1, 0, -1])
    loss, lse = _cpu.cross_entropy_forward(logits, targets)
    dlogits = _cpu.cross_entropy_backward(np.ones(4, np.float32), logits, targets, lse)
    assert np.all(loss[1::2] == 0) and np.all(dlogits[1::2] == 0) and np.all(dlogits[::2] != 0)


# ---- errors ------------------------------------------------------------------------------------

f32 = np.ones((2, 3), np.float32)
heads = np.ones((2, 4, 5, 8), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "[rms_norm_forward] x: expected float32, got float64", lambda: _cpu.rms_norm_forward(np.ones((2, 3)), f32[0], 1e-5)),
        (TypeError, "[embedding_forward] tokens: expected int32 or int64, got float32", lambda: _cpu.embedding_forward(f32, f32)),
        (ValueError, "[matmul] b: expected (K, N) = (3, any), got (2, 3)", lambda: _cpu.matmul(f32, f32)),
        (ValueError, "[rms_norm_forward] weight: expected (C) = (3,), got (2,)", lambda: _cpu.rms_norm_forward(f32, f32[:, 0], 1e-5)),
        (ValueError, "[attention_forward] k: expected (B, G, S, D) = (2, any, any, 8), got (2, 4, 5, 7)", lambda: _cpu.attention_forward(heads, heads[..., :7], heads)),
        (ValueError, "[attention_forward] v: expected (B, G, S, D) = (2, 2, 5, 8), got (2, 4, 5, 8)", lambda: _cpu.attention_forward(heads, heads[:, :2], heads)),
        (ValueError, "[linear_backward] dx: expected another array than dy", lambda: _cpu.linear_backward(f32, f32, np.ones((3, 3), np.float32), dx=f32)),
        (ValueError, "inhomogeneous", lambda: _cpu.global_norm([[[1.0], [2.0, 3.0]]])),
        (ValueError, "[attention_forward] k: expected G dividing H = 4, got G = 3", lambda: _cpu.attention_forward(heads, heads[:, :3], heads[:, :3])),
        (ValueError, "[attention_forward] gap: expected (B, T, 2) = (2, 5, 2), got (2, 5)", lambda: _cpu.attention_forward(heads, heads, heads, None, np.zeros((2, 5), np.int32))),
        (ValueError, "[prefix_attention] prefix_k: expected (P, G, S, D) = (any, 2, any, 8), got (2, 4, 5, 8)", lambda: _cpu.prefix_attention(heads, heads[:, :2], heads[:, :2], heads, heads, np.array([0, 1]))),
        (ValueError, "[prefix_attention] prefix: expected values in [0, 2), got 2", lambda: _cpu.prefix_attention(heads, heads, heads, heads, heads, np.array([0, 2]))),
        (ValueError, "[embedding_forward] tokens: expected values in [0, 2), got 2", lambda: _cpu.embedding_forward(np.array([0, 2]), f32)),
        (ValueError, "[embedding_forward] tokens: expected values in [0, 2), got -1", lambda: _cpu.embedding_forward(np.array([0, -1]), f32)),
        (ValueError, "[embedding_backward] tokens: expected values in [0, 3), got 4294967296", lambda: _cpu.embedding_backward(f32, np.array([0, 1 << 32]), 3)),
        (ValueError, "[cross_entropy_forward] targets: expected values in [-1, 3), got 3", lambda: _cpu.cross_entropy_forward(f32, np.array([0, 3]))),
        (ValueError, "[linear_cross_entropy_forward] targets: expected values in [-1, 2), got -2", lambda: _cpu.linear_cross_entropy_forward(f32, f32, np.array([0, -2]))),
        (ValueError, "[rope_forward] positions: expected values in [0, 6), got 6", lambda: _cpu.rope_forward(heads, *np.ones((2, 6, 4), np.float32), np.full((2, 5), 6))),
        (ValueError, "[rope_forward] x: expected an even head size D, got 7", lambda: _cpu.rope_forward(heads[..., :7], f32, f32, np.zeros((2, 5), int))),
        (ValueError, "[adamw] m: expected a C-contiguous array", lambda: _cpu.adamw(f32.copy(), f32, np.ones((3, 2), np.float32).T, f32.copy(), 1, 0.9, 0.9, 1, 0, 1)),
        (ValueError, "[adamw] param: expected a writable array", lambda: _cpu.adamw(np.broadcast_to(f32, (2, 3)), f32, f32.copy(), f32.copy(), 1, 0.9, 0.9, 1, 0, 1)),
        (ValueError, "[adamw] step: expected at least 1, got 0", lambda: _cpu.adamw(f32.copy(), f32, f32.copy(), f32.copy(), 1, 0.9, 0.9, 1, 0, 0)),
        (ValueError, "[muon] param: expected (M, N) = (any, any), got (3,)", lambda: _cpu.muon([(f32[0].copy(), f32[0], f32[0].copy())], 1, 0.9, 0)),
        (ValueError, "[muon] grad: expected the shape of param = (2, 3), got (3,)", lambda: _cpu.muon([(f32.copy(), f32[0], f32.copy())], 1, 0.9, 0)),
        (ValueError, 'got "mmx"', lambda: _cpu.use_isa("mmx")),
        (ValueError, "[set_threads] n: expected at least 1, got 0", lambda: _cpu.set_threads(0)),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(error, message, call):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


# ---- edges of the world ------------------------------------------------------------------------


@every_isa
def test_empty_arrays(isa):
    _cpu.use_isa(isa)
    none, weight, tokens = np.ones((0, 3), np.float32), f32, np.zeros(0, np.int32)
    assert _cpu.linear_forward(none, weight).shape == (0, 2)
    assert np.array_equal(_cpu.matmul(none.T, none), np.zeros((3, 3)))  # a sum over nothing
    assert np.array_equal(_cpu.linear_backward(none[:, :2], none, weight)[1], np.zeros((2, 3)))
    assert np.array_equal(_cpu.embedding_backward(none, tokens, 2), np.zeros((2, 3)))
    assert np.array_equal(_cpu.rms_norm_backward(none, none, f32[0], none[:, 0])[1], np.zeros(3))
    loss, lse = _cpu.linear_cross_entropy_forward(none, weight, tokens)
    dx, dweight = _cpu.linear_cross_entropy_backward(loss, none, weight, tokens, lse)
    assert loss.shape == (0,) and dx.shape == (0, 3) and np.array_equal(dweight, np.zeros((2, 3)))
    out, lse = _cpu.attention_forward(heads, heads[:, :, :0], heads[:, :, :0])
    assert np.all(out == 0) and np.all(lse == -np.inf)
    assert _cpu.attention_forward(heads[:, :, :0], heads, heads)[0].shape == (2, 4, 0, 8)
    assert _cpu.attention_forward(heads[:0], heads[:0], heads[:0])[0].shape == (0, 4, 5, 8)
    assert _cpu.gelu_forward(none).shape == (0, 3) and _cpu.global_norm([]) == 0
    wide = np.ones((40, 3), np.float32)
    assert not _cpu.matmul(wide[:, :0], np.ones((0, 32), np.float32)).any()
    assert _cpu.matmul(f32, wide[:3, :0]).shape == (2, 0)


def test_arrays_stay_whole_while_memory_is_reused():
    x = np.arange(1 << 16, dtype=np.float32).reshape(256, 256)
    eye, kept = np.eye(256, dtype=np.float32), []
    for i in range(8):
        kept.append(_cpu.matmul(x + i, eye))
    assert all(np.array_equal(y, x + i) for i, y in enumerate(kept))


def test_memory_is_given_out_in_parts_and_joined_again():
    whole = [1 << 24]
    _cpu.empty(whole)
    before = _cpu.pool_bytes()
    parts = [_cpu.empty([1 << 20]) for _ in range(16)]
    for i, x in enumerate(parts):
        x.fill(i)
    assert all((x == i).all() for i, x in enumerate(parts))
    del parts[::2], x
    halves = [_cpu.empty([1 << 19]) for _ in range(16)]  # fill the gaps
    del parts, halves
    for _ in range(20):
        _cpu.empty(whole)
        _cpu.matmul(f32, f32.T)
    assert _cpu.pool_bytes() == before  # 0 in a sanitizer's build, which keeps nothing


def in_little_memory(room: int, program: str) -> None:
    """Run a program whose address space may grow by so many bytes, as `ulimit -v` limits it."""
    _cpu.empty([1])
    if sys.platform != "linux" or not _cpu.pool_bytes():
        pytest.skip("reads /proc; a sanitizer's build keeps nothing")
    start = f"""
import resource
from pathlib import Path
import numpy
from tinylm.kernels import _cpu
used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + {room}, used + {room}))
"""
    subprocess.run([sys.executable, "-c", start + program], check=True, cwd="/", timeout=60)


def test_the_pool_leaves_memory_to_others_where_it_is_limited():
    """It takes address space that it may never use, which others need."""
    # of twice what the machine has: a first request would leave an eighth
    some = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16
    in_little_memory(some + some // 8, f"_cpu.empty([1 << 20]); bytearray({some // 4})")


def test_muon_without_memory_is_an_error_and_not_the_end():
    program = """
matrices = [[numpy.ones((600, 600), "float32") for _ in range(3)] for _ in range(2)]
held = []
try:
    while True:
        held.append(_cpu.empty([1 << 18]))
except MemoryError:
    pass
try:
    _cpu.muon(matrices, 1.0, 0.9, 0.0)
except MemoryError:
    held.clear()
assert not held
"""
    in_little_memory(256 << 20, program)


def test_a_child_of_fork_computes_the_same_bits():
    x = Draw(0)(300, 300).astype(np.float32)
    _cpu.set_threads(2)
    expected = _cpu.matmul(x, x).tobytes()  # the parent's threads exist now
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
        child = os.fork()
    if child == 0:
        _cpu.set_threads(2)
        os._exit(0 if _cpu.matmul(x, x).tobytes() == expected and _cpu.threads() == 1 else 1)
    for _ in range(2000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert _cpu.matmul(x, x).tobytes() == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "3000 1"),
        ({"GOMP_SPINCOUNT": "7"}, "7 1"),
        ({"OMP_WAIT_POLICY": "active"}, "None None"),
    ],
)
def test_threads_wait_asleep_unless_told_otherwise(asked, expected, tmp_path):
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    ask = f"import os, tinylm.kernels; print(*map(os.environ.get, {names[:2]}))"
    others = {name: value for name, value in os.environ.items() if name not in names}
    command, env = [sys.executable, "-c", ask], others | asked
    told = subprocess.check_output(command, env=env, cwd=tmp_path, text=True)
    assert told.strip() == expected
