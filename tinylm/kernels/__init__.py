"""The kernel contract: which functions a backend offers, and the letters their shapes use.

    B  batch                 H  query heads           C  model width
    T  query tokens          G  key/value heads       F  feed-forward width
    S  key tokens            D  head size             V  vocabulary
    N  rows: B·T             P  positions; in prefix_attention, prefixes

The same names stand in reference.py (NumPy, written to be read), in csrc/cpu (C++ with OpenMP) and
in cases.py (what the parity and gradient checks walk). A kernel takes and returns plain
arrays and never knows a Tensor; a backward repeats what its forward read, plus the few residuals
that the forward returned, and some can be told where to write a gradient. `dx` is the gradient of
the loss with respect to `x`, and has its shape.
"""

import os

from tinylm.kernels import reference

# How often a thread that waits for another one looks, before it sleeps. GCC's OpenMP reads it when
# it is loaded; by itself it looks for milliseconds, and so keeps the other one from its core: next
# to a busy process a step took 20 to 30 times as long, and takes 2 to 3 times now. 3,000 looks are
# 30 us on a Xeon, more than Python needs from one kernel to the next: with 1,000 a single stream of
# text came at half the speed. Clang's OpenMP, which is a Mac's, looks for 200 ms; here for 1 ms.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")

# What a backend offers: the functions of the specification.
CONTRACT = tuple(n for n, f in vars(reference).items() if callable(f) and not n.startswith("_"))

# What kernels on a device offer besides, so that the host need not wait for it.
ON_A_DEVICE = ("set_products", "settle", "scale_evenly", "guarded_adamw", "later", "recorded")
