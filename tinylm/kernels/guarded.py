"""AdamW on a device that judges its gradients itself: no step waits for the host.

The norm, whether the update may be made (train.Guard's rule) and by how much it is clipped stay on
the device, in the buffers described in csrc/cuda/adamw.cu; the host learns of them afterwards.
"""

from __future__ import annotations

from tinylm.kernels.arguments import Arguments

PIECE = 1 << 14  # numbers of a tensor that one block works on
POINTERS = 16  # that one launch of put_pointers takes
TOLD = 6  # loss, norm, updates made, and what is noted in `fault`


class GuardedAdamW:
    """The update of tensors of these sizes, each with its weight decay.

    state: the guard's running mean of the norm and how many it has seen; updates so far.
    """

    def __init__(self, kernels, sizes, decays, beta1, beta2, eps, clip, state):
        self.kernels, self.xp, self.sizes = kernels, kernels.xp, sizes
        self.numbers = tuple(map(float, (1 - beta1, 1 - beta2, eps)))
        pieces = [
            (tensor, first, min(size, first + PIECE))
            for tensor, size in enumerate(sizes)
            for first in range(0, size, PIECE)
        ]
        self.n, self.pieces = len(pieces), self.xp.asarray(pieces, "int64")
        self.decays = self.xp.asarray(decays, "float32")
        self.settings = self.xp.asarray([beta1, beta2, clip], "float64")
        self.guard = self.xp.asarray(state, "float64")

    def __call__(self, loss, rate, tensors):
        """loss a float64, rate (1,) a float32, tensors: (param, grad or None, m, v) of each
        -> TOLD numbers, float64."""
        launch, empty = self.kernels.launch, self.xp.empty
        table, partial = self.table(tensors), empty(self.n, "float64")
        told, plan, fault = empty(TOLD, "float64"), empty(4, "float32"), self.kernels.fault
        launch("sum_squares_of_pieces", (self.n,), table, self.pieces, partial)
        given = (partial, self.n, loss, self.settings, fault, self.guard, told, plan)
        launch("judge", (1,), *given, block=1024)
        given = (table, self.pieces, self.decays, plan, rate, *self.numbers)
        launch("adamw_of_pieces", (self.n,), *given)
        return told

    def table(self, tensors):
        """Where all of them lie, four pointers each, on the device. Gradients, which are new in
        every step, are checked."""
        args = Arguments(self.kernels, "guarded_adamw")
        for size, (param, grad, *_) in zip(self.sizes, tensors, strict=True):
            if grad is not None:
                args.in_place("grad", grad, param.shape)
            if param.size != size:
                args.wrong("param", f"{size} numbers, got {param.size}")
        pointers = [x for tensor in tensors for x in tensor]
        pointers += [None] * (-len(pointers) % POINTERS)
        table = self.xp.empty(len(pointers), "int64")
        for at in range(0, len(pointers), POINTERS):
            some = pointers[at : at + POINTERS]
            self.kernels.launch("put_pointers", (1,), table[at:], *some, block=32)
        return table
