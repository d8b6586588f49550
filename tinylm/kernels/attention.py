"""Attention on a GPU: how csrc/cuda/attention*.cu are launched. A part of launch.Kernels."""

from __future__ import annotations

from tinylm.kernels.arguments import THREADS, WARPS, Arguments, up

INT32_MAX = 2**31 - 1


class Attention:
    """The three functions of CONTRACT; Kernels has the rest."""

    def attention_forward(self, q, k, v, start=None, gap=None):
        args = Arguments(self, "attention_forward")
        q, k, v, sight, (H, G, T, S, D) = self.attention_inputs(args, q, k, v, start, gap)
        B = q[0].shape[0]
        out, lse = self.empty_heads(B, H, T, D), self.empty((B, H, T))
        arguments = (*q, *k, *v, *sight, out, lse, H, G, T, S, D)
        self.launch_attention("forward", (2, 1, 1, 1), (T, H, B), *arguments)
        return out, lse

    def attention_inputs(self, args, q, k, v, start, gap=None):
        q = args.heads("q", q)
        B, H, T, D = q[0].shape
        k = args.heads("k", k, "(B, G, S, D)", (B, None, None, D))
        v = args.heads("v", v, "(B, G, S, D)", k[0].shape)
        _, G, S, _ = k[0].shape
        if G == 0 or H % G:
            args.wrong("k", f"G dividing H = {H}, got G = {G}")
        if D > 256:
            args.wrong("q", f"a head size D of at most 256, got {D}")
        if start is not None:
            start, _ = args.ints("start", start, "(B, T)", (B, T), -INT32_MAX)
        if gap is not None:
            gap, _ = args.ints("gap", gap, "(B, T, 2)", (B, T, 2), -INT32_MAX)
        return q, k, v, (start, gap), (H, G, T, S, D)

    def launch_attention(self, name, tiles, grid, *arguments) -> None:
        """grid: tokens that blocks share, heads, rows of the batch; D is the last argument."""
        bfloat16 = self.products == "bfloat16"
        ending, tile, block, shared = attention_plan(arguments[-1], bfloat16, tiles)
        grid = (up(grid[0], tile), *grid[1:])
        self.launch(f"attention_{name}_{ending}", grid, *arguments, block=block, shared=shared)

    def attention_backward(self, dout, q, k, v, out, lse, start=None, gap=None):
        args = Arguments(self, "attention_backward")
        q, k, v, sight, shape = self.attention_inputs(args, q, k, v, start, gap)
        (B, H, T, D), (_, G, S, _) = q[0].shape, k[0].shape
        dout = args.heads("dout", dout, shape=q[0].shape)
        out = args.heads("out", out, shape=q[0].shape)
        lse = args.floats("lse", lse, "(B, H, T)", (B, H, T))
        delta = self.empty((B, H, T))
        self.launch("attention_delta", (up(T, WARPS), H, B), *dout, *out, delta, T, D)
        dq = self.empty_heads(B, H, T, D)
        dk, dv = self.empty_heads(B, G, S, D), self.empty_heads(B, G, S, D)
        inputs = (*dout, *q, *k, *v, lse, delta, *sight)
        self.launch_attention("backward_q", (4, 2, 2, 1), (T, H, B), *inputs, dq, *shape)
        self.launch_attention("backward_kv", (4, 2, 2, 2), (S, G, B), *inputs, dk, dv, *shape)
        return dq, dk, dv

    def prefix_attention(self, q, k, v, prefix_k, prefix_v, prefix, start=None):
        args, xp = Arguments(self, "prefix_attention"), self.xp
        q, _, _, _, (_, G, _, _, D) = self.attention_inputs(args, q, k, v, None)
        args.shape("prefix_k", prefix_k, "(P, G, S, D)", (None, G, None, D))
        args.shape("prefix_v", prefix_v, "(P, G, S, D)", prefix_k.shape)
        args.shape("prefix", prefix, "(B)", (len(k),))
        k = xp.concatenate([prefix_k[prefix], k], 2)
        v = xp.concatenate([prefix_v[prefix], v], 2)
        return self.attention_forward(q[0], k, v, start)[0]


def attention_plan(D: int, bfloat16: bool, tiles: tuple[int, int, int, int]) -> tuple:
    """How the attention kernels hold head size D: the ending of their name, queries (or keys) to a
    block, threads, bytes of shared memory. See the lines ATTENTION in csrc/cuda/attention*.cu.

    tiles: how many are in float32; in bfloat16 of the block's own tokens by rows, of those that it
    meets by rows, and by pairs.
    """
    size = next(size for size in (32, 64, 128, 256) if size >= D)
    if bfloat16 and size <= 128:
        size = max(size, 64)
        met = 64 if size <= 64 else 32
        row, pair = size // 2 + 4, size + 8
        words = tiles[1] * 64 * row + tiles[2] * met * row + tiles[3] * met // 2 * pair
        return f"bfloat16_{size}", 64, 128, 4 * words
    tile = 16 * {32: 4, 64: 4, 128: 2, 256: 1}[size]
    return str(size), tile, THREADS, 4 * tile * (tiles[0] * (size + 4) + tile + 4)
