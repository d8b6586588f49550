"""What CuPy is to the rest of tinylm, without a GPU: arrays that are not NumPy's and refuse to mix.

A CuPy array never becomes a NumPy array unless it is asked to (`.get()`), and never meets one in an
expression. So code that forgets where its arrays live works on the CPU and fails on a GPU; on these
arrays it fails here. Fresh memory is NaN, or a number that is no index. The module stands for
`cupy`: its functions are numpy's.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy

_reads = True  # whether the host may wait for the device and read what it has computed


@contextmanager
def no_reads():
    """Inside, whatever would wait for a device is an error."""
    global _reads
    before, _reads = _reads, False
    try:
        yield
    finally:
        _reads = before


def to_host(x: numpy.ndarray) -> numpy.ndarray:
    """What a read of device memory goes through."""
    if not _reads:
        raise RuntimeError("a host read, where nothing may wait for the device")
    return x


def unwrap(x):
    """The memory of a device array, wherever in x; a NumPy array among the arguments is refused."""
    if isinstance(x, ndarray):
        return x.memory
    if isinstance(x, numpy.ndarray):
        raise TypeError("Unsupported type numpy.ndarray: it is not on the device")
    if isinstance(x, (tuple, list)):
        return type(x)(map(unwrap, x))
    return x


def wrap(x, parent=None):
    """A NumPy result on the device: a view of its parent, or memory of its own."""
    if isinstance(x, tuple):
        return tuple(wrap(part, parent) for part in x)
    if not isinstance(x, (numpy.ndarray, numpy.generic)):
        return x
    if parent is not None and isinstance(x, numpy.ndarray) and numpy.may_share_memory(
        x, parent.memory
    ):  # fmt: skip
        return ndarray(x, parent if parent.base is None else parent.base)
    return ndarray(numpy.asarray(x))


class ndarray:
    """A NumPy array behind glass."""

    __hash__ = None

    def __init__(self, memory: numpy.ndarray, base=None):
        self.memory, self.base = memory, base

    def __getattr__(self, name):
        if name in ("item", "tolist"):
            return getattr(to_host(self.memory), name)
        value = getattr(self.memory, name)
        if name in ("shape", "dtype", "ndim", "size", "itemsize", "nbytes", "strides", "flags"):
            return value
        if name == "T":
            return wrap(value, self)
        if not callable(value) or name.startswith("__"):
            raise AttributeError(f"a device array has no {name} that tinylm may use")

        def method(*args, **kwargs):
            kwargs = {k: unwrap(v) for k, v in kwargs.items()}
            return wrap(value(*map(unwrap, args), **kwargs), self)

        return method

    def __getitem__(self, at):
        if isinstance(at, ndarray) and at.dtype == "bool":
            to_host(at.memory)  # the shape of the result depends on it
        return wrap(self.memory[unwrap(at)], self)

    def __setitem__(self, at, value):
        self.memory[unwrap(at)] = unwrap(value)

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):  # numpy scalar · array
        return wrap(getattr(ufunc, method)(*map(unwrap, inputs), **kwargs))

    @property
    def data(self):
        return SimpleNamespace(ptr=self.memory.ctypes.data)

    def get(self):
        return to_host(self.memory).copy()

    def __len__(self):
        return len(self.memory)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(to_host(self.memory))

    def __float__(self):
        return float(to_host(self.memory))

    def __int__(self):
        return int(to_host(self.memory))


def _operator(name):
    def operate(self, *others):
        return wrap(getattr(self.memory, name)(*map(unwrap, others)))

    def in_place(self, other):
        getattr(self.memory, name)(unwrap(other))
        return self

    return in_place if name.startswith("__i") and name != "__invert__" else operate


ARITHMETIC = ("add", "sub", "mul", "truediv", "pow")
SWAPPED = ("radd", "rsub", "rmul", "rtruediv")
IN_PLACE = ("iadd", "isub", "imul", "itruediv")
LOGIC = ("lt", "le", "eq", "ne", "gt", "ge", "and", "or", "invert", "neg")
for _name in (*ARITHMETIC, *SWAPPED, *IN_PLACE, *LOGIC):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def asarray(x, dtype=None):
    if isinstance(x, ndarray):
        return x if dtype is None or x.dtype == dtype else x.astype(dtype)
    return ndarray(numpy.array(x, dtype))


def ascontiguousarray(x):
    return x if x.flags.c_contiguous else x.copy()


def empty(shape, dtype="float64"):
    memory = numpy.empty(shape, dtype)
    memory.fill(numpy.nan if memory.dtype.kind == "f" else numpy.iinfo(memory.dtype).max)
    return ndarray(memory)


def __getattr__(name):
    found = getattr(numpy, name)

    def function(*args, **kwargs):
        return wrap(found(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()}))

    return function if callable(found) and not isinstance(found, type) else found
