"""The tape: gradients add up, graphs are freed, long chains do not recurse."""

import gc
import weakref

import numpy
import pytest

from tinylm import Tensor, no_grad, ops

pytestmark = pytest.mark.usefixtures("float64")


def test_gradient_of_a_value_used_twice_is_the_sum():
    x = Tensor(numpy.array([2.0, 3.0]), requires_grad=True)
    (x * x + x).sum().backward()
    assert x.grad.tolist() == [5.0, 7.0]


def test_a_second_backward_through_a_freed_graph_is_refused():
    x = Tensor(numpy.ones(3), requires_grad=True)
    y = (x * 2).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="freed"):
        y.backward()
    assert x.grad.tolist() == [2.0] * 3  # and the refused call left no trace


def test_a_graph_that_shares_a_freed_part_is_refused_before_any_gradient_moves():
    x = Tensor(numpy.ones(3), requires_grad=True)
    w = Tensor(numpy.ones(3), requires_grad=True)
    shared = x * 2
    shared.sum().backward()
    with pytest.raises(RuntimeError, match="freed"):
        (shared * w).sum().backward()
    assert w.grad is None


def test_separate_graphs_accumulate_into_the_leaf():
    x = Tensor(numpy.ones(2), requires_grad=True)
    for _ in range(3):
        (x * 2).sum().backward()
    assert x.grad.tolist() == [6.0, 6.0]


def test_ten_thousand_ops_in_a_row_need_no_recursion():
    x = y = Tensor(numpy.ones(1), requires_grad=True)
    for _ in range(10_000):
        y = y + x
    y.backward()
    assert x.grad[0] == 10_001


def test_backward_frees_the_arrays_that_closures_held():
    class Watched(numpy.ndarray):
        pass

    x = Tensor(numpy.ones(4).view(Watched), requires_grad=True)
    inner = ops.mul(x, x)
    gone = weakref.ref(inner.data)
    out = ops.mul(inner, inner).sum()
    del inner
    out.backward()
    gc.collect()
    assert gone() is None


def test_leaves_do_not_share_a_gradient():
    """Sums are written into arrays in place: one that two leaves share would be counted twice."""
    x, y = (Tensor(numpy.ones(2), requires_grad=True) for _ in range(2))
    (x + y + ops.mul(y, y)).sum().backward()
    (x + y).sum().backward()
    assert x.grad.tolist() == [2, 2]
    assert y.grad.tolist() == [4, 4]


def test_a_fork_far_from_its_join_adds_up():
    x = Tensor(numpy.arange(3.0), requires_grad=True)
    y = x * 2
    z = y + x
    (z + y * y + x.reshape(3) + z.reshape(3)).sum().backward()
    assert x.grad.tolist() == [7, 15, 23]


def test_no_grad_records_nothing_and_ends_with_an_exception():
    x = Tensor(numpy.ones(2), requires_grad=True)
    with no_grad():
        y = x * 3
    assert not y.requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * 3).requires_grad


def test_backward_without_a_gradient_needs_a_scalar_and_a_leaf():
    x = Tensor(numpy.ones(2), requires_grad=True)
    with pytest.raises(RuntimeError, match="needs a gradient"):
        (x * 2).backward()
    with pytest.raises(RuntimeError, match=r"needs a gradient of its shape, \(2,\)"):
        (x * 2).backward(numpy.ones(1))
    assert x.grad is None
    with pytest.raises(RuntimeError, match="requires a gradient"):
        Tensor(numpy.ones(1)).backward()


def test_a_tensor_that_needs_no_gradient_gets_none():
    x, w = Tensor(numpy.ones(2)), Tensor(numpy.ones(2), requires_grad=True)
    (x * w).sum().backward()
    assert x.grad is None
    assert w.grad.tolist() == [1, 1]


def test_an_infinite_loss_has_the_gradient_of_any_other():
    x = Tensor(numpy.array([numpy.inf, 1.0]), requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2, 2]


def test_an_array_may_stand_on_either_side():
    """numpy would make an array of Tensors, one for each number."""
    x, array = Tensor(numpy.ones(3), requires_grad=True), numpy.arange(3.0)
    for y, slope in ((array * x, [0, 1, 2]), (array + x, [1] * 3), (array - x, [-1] * 3)):
        x.grad = None
        y.sum().backward()
        assert x.grad.tolist() == slope


def test_what_is_no_array_is_refused_by_name():
    x = Tensor(numpy.ones(2, "float32"), requires_grad=True)
    for data in ([1.0, 2.0], 3.0, None, x):
        with pytest.raises(TypeError, match="a Tensor is made of an array, got"):
            Tensor(data)
    for grad in (1.0, [1.0, 1.0]):
        with pytest.raises(RuntimeError, match="needs a gradient of its shape"):
            (x * 2).backward(grad)
    with pytest.raises(TypeError, match="the gradient is an array, not a Tensor"):
        (x * 2).backward(x)
