"""What CuPy is to the rest of tinylm, without a GPU: arrays that are not NumPy's and refuse to mix.

A CuPy array never becomes a NumPy array unless it is asked to (`.get()`), and never meets one in an
expression. So code that forgets where its arrays live works on the CPU and fails on a GPU; on these
arrays it fails here. Fresh memory is NaN, or a number that is no index. The module stands for
`cupy`: its functions are numpy's.

`recording` is what a CUDA graph's capture is: nothing is computed, all is noted with the memory
that it reads and writes, and can be done again; what a capture cannot note is an error.
"""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import numpy

_reads = True  # whether the host may wait for the device and read what it has computed
_tape = None  # the Tape that is being recorded


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


class Tape:
    """What was asked of the device, in order. Memory made meanwhile is the tape's own, and stays;
    other memory that it works on must still be there when it is played."""

    def __init__(self):
        self.acts, self.own, self.others = [], {}, {}

    def note(self, act, *arrays) -> None:
        self.acts.append(act)
        for x in arrays:
            owner = owner_of(x)
            if id(owner) not in self.own:
                self.others[id(owner)] = weakref.ref(owner)

    def play(self) -> None:
        if any(array() is None for array in self.others.values()):
            raise RuntimeError("a graph that works on memory which was freed")
        for act in self.acts:
            act()


def owner_of(x: numpy.ndarray) -> numpy.ndarray:
    while isinstance(x.base, numpy.ndarray):
        x = x.base
    return x


@contextmanager
def recording():
    global _tape
    assert _tape is None, "a capture within a capture"
    _tape = Tape()
    try:
        with no_reads():
            yield _tape
    finally:
        _tape = None


def act(do, *arrays) -> None:
    """Change memory: now, or when the tape is played."""
    if _tape is None:
        do()
    else:
        _tape.note(do, *arrays)


def computed(function, args, kwargs=None, parent=None):
    """What a function of numpy's makes of device arrays: new memory, or a view of its parent."""
    args, kwargs = unwrap(args), {k: unwrap(v) for k, v in (kwargs or {}).items()}
    found = wrap(function(*args, **kwargs), parent)
    if _tape is not None and isinstance(found, ndarray):
        known = [x for x in (*args, *kwargs.values()) if isinstance(x, numpy.ndarray)]
        if not any(numpy.may_share_memory(found.memory, x) for x in known):
            out = _tape.own.setdefault(id(found.memory), found.memory)
            _tape.note(lambda: numpy.copyto(out, function(*args, **kwargs)))
            spoil(out)
    return found


def spoil(memory: numpy.ndarray) -> None:
    """Fill with what nothing should have read."""
    if memory.dtype.kind in "fiu":
        memory.fill(numpy.nan if memory.dtype.kind == "f" else numpy.iinfo(memory.dtype).max)


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
        method = getattr(numpy.ndarray, name)
        return lambda *args, **kwargs: computed(method, (self, *args), kwargs, self)

    def fill(self, value):
        act(lambda: self.memory.fill(value), self.memory)

    def __getitem__(self, at):
        if isinstance(at, ndarray) and at.dtype == "bool":
            to_host(at.memory)  # the shape of the result depends on it
        return computed(numpy.ndarray.__getitem__, (self, at), None, self)

    def __setitem__(self, at, value):
        at, value = unwrap(at), unwrap(value)
        act(lambda: self.memory.__setitem__(at, value), self.memory)

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):  # numpy scalar · array
        return computed(getattr(ufunc, method), inputs, kwargs)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.memory.ctypes.data)

    def get(self, out=None, blocking=True):
        """With blocking=False it is copied when the device comes to it."""
        if out is None:
            return to_host(self.memory).copy()
        assert not blocking
        act(lambda: numpy.copyto(out, self.memory), self.memory)
        return out

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
    function = getattr(numpy.ndarray, name)

    def operate(self, *others):
        return computed(function, (self, *others))

    def in_place(self, other):
        other = unwrap(other)
        act(lambda: function(self.memory, other), self.memory)
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
    if _tape is not None:
        raise RuntimeError("memory of the host is copied while a graph is being recorded")
    return ndarray(numpy.array(x, dtype))


def ascontiguousarray(x):
    return x if x.flags.c_contiguous else x.copy()


def empty(shape, dtype="float64"):
    memory = numpy.empty(shape, dtype)
    spoil(memory)
    if _tape is not None:
        _tape.own[id(memory)] = memory
    return ndarray(memory)


def __getattr__(name):
    found = getattr(numpy, name)

    def function(*args, **kwargs):
        return computed(found, args, kwargs)

    return function if callable(found) and not isinstance(found, type) else found
