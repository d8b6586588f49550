// matmul.cpp - C = op(A) op(B) + bias: every matrix product of a model, in every layout.
//
//        nc columns                 for each block of nc columns and kc values of depth:
//        ┌───────┐                      pack that block of B into panels NR wide     (stays in L3)
//     kc │   B   │                      for each block of mc rows:
//        └───────┘                          pack that block of A into panels MR high (stays in L2)
//    kc  ┌───────┐                          for each panel of B, for each panel of A:
//   ┌──┐ │   C   │ mc                           the micro-kernel: MR x NR sums in registers
//   │A │ │       │                                (the panel of B stays in L1)
//   └──┘ └───────┘
//
// Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008). Packing reads
// a transposed operand just as well as a plain one, so that all layouts run at the same speed.
//
// Threads pack blocks of A each for themselves, small enough that every one has several: what one
// core has packed is slow for another one to read (768 x 128 x 128 on two cores of a Zen 4: 75 ->
// 86 % of the peak in float32, 76 -> 160 in bfloat16). Where A fits in L2 whole and B is wide, it
// is the other way round: A comes whole, packed once, and each thread packs its own panels of B
// (768 x 128 x 512: 83 -> 90 %).
//
// With vectors of 16 floats, best is not to pack. In float32 a tile takes A's numbers one at a
// time, wherever they lie, and so A is packed only for many columns, or where its rows would meet
// in few sets of a cache; a small B that is not transposed is taken as it lies too (two cores of a
// Zen 5, dW of 768 x 128 x 128: 69 -> 85 % of the peak, and 46 -> 80 while the cores are slow to
// read from each other; of 16,384 x 384 x 65: x1.18). Then threads take columns more often: from
// four panels on, if they divide evenly, and where A is larger than L2. Chips of Intel are slower
// where operands lie far apart, and pack sooner (one thread of a Xeon, dW of 4,096 x 384 x 1,536:
// x1.36, of 1,024 x 384 x 384 x1.17; steps of models 384 and 768 wide x1.16 and x1.19). Narrower
// vectors always pack, and tiles prefetch nothing (with deeper blocks, steps on a Zen 3, AVX2: x1.2
// to 1.4).
//
// A B that is multiplied by again and again, as weights are in generation, can be packed whole and
// once (64 rows by weights out of cache, 384 x 1,024 and 1,024 x 384, one thread of a Zen 4:
// 85 -> 92 and 68 -> 90 % of the float32 peak; bfloat16, two threads: 136 -> 173 and 121 -> 165).
//
// Each element of C is one chain of multiply-adds in the order of k, cut only at multiples of kc,
// and kc depends on K alone: neither the tiles nor the threads change a bit.
//
// A word (word.h) is 32 bits of depth: one float32, or two neighbours along k in bfloat16. For
// bfloat16 operands are rounded while they are packed, and everything else stays as it is. With AMX
// (amx.h) float32 is split into three parts of bfloat16 while it is packed: 1.4 to 1.8 times as
// fast as vectors (two threads of a Xeon, products of a model).
//
// 4,096 x 384 x 1,536 on two threads of a Zen 4: 92 / 91 % of the float32 peak, forward / backward.
#include "few_rows.h"
#include "micro_kernel.h"

namespace ISA {
// Measured on Zen 5 (AVX-512) and Zen 3 (AVX2); bits depend on kc, not on the rest.
struct Blocking {
    long kc, mc, nc;
    long blocks;  // of rows, at least
};
constexpr Blocking blocking = WIDE ? Blocking{768, 112, 3072, 14} : Blocking{384, 96, 2048, 6};

// ---- one block of columns and depth ------------------------------------------------------------

struct Plan {  // kc and nc from the shape alone, the rest from threads, strides and the chip too
    long kc, mc, nc, row_blocks;
    bool pack_a, pack_b;  // or else it is multiplied as it lies
    long own_b;  // 0: B is packed once for all, and each thread takes blocks of rows, and packs
                 // them for itself. Else each thread takes so many panels of B at a time, and packs
                 // them for itself, and all of A, which is packed once for all (if they are packed)
    bool fetch;  // what is needed next, in time: for vectors, as it lies, blocks of A and panels of
                 // a B that is large; for tiles, which take less long, packed panels of B
};
template <class Word>
static Plan plan_for(const Product& p, int threads) {
    using Micro = MicroKernel<Word>;
#if LANES == 16
    const bool intel = __builtin_cpu_is("intel");
#else
    constexpr bool intel = false;  // or of no matter
#endif
    const long values = max(1, Word::PER_WORD / Word::PARTS);  // of depth, to a packed word
    const long K = max(p.K, 1), M = max(p.M, 1), N = max(p.N, 1);
    Plan plan;
    plan.kc = round_up(up(K, up(K, blocking.kc * values)), max(16, Word::GROUP * Word::PER_WORD));
    plan.nc = round_up(up(N, up(N, blocking.nc)), NR);
    plan.mc =
        round_up(up(M, max(up(M, blocking.mc), Micro::TILES ? 8 : blocking.blocks)), Micro::ROWS);
    plan.row_blocks = up(M, plan.mc);

    const bool in_few_sets = p.lda % (p.transpose_a ? 512 : 1024) == 0;  // of the caches
    // each value of k on a page of its own, and enough columns and depth that packing pays
    const bool on_pages = intel && p.transpose_a && p.lda >= 1024 && N > NR && K > 64;
    const long in_place = !intel ? 2048 : p.transpose_a ? 128 : 256;  // columns, at most
    const bool lies_well = N <= in_place && !in_few_sets;
    plan.pack_a = PACKED<Word> || !lies_well || on_pages;
    plan.pack_b =
        PACKED<Word> || plan.kc * N > 1 << 17 || N % NR || p.transpose_b || (intel && !lies_well);

    constexpr long L2 = Micro::TILES ? 1 << 19 : 1 << 18;  // in words
    const long panels = plan.nc / NR, packed = words_of<Word>(plan.kc) * Word::PARTS;
    const long share = up(panels, threads);  // of the thread that has most
    // of an A that all threads read
    const long reach = plan.pack_a || intel ? L2 : p.transpose_a ? 2 * L2 : 8 * L2;
    const bool by_panels = panels >= (plan.pack_a ? 12 : 4) && M * packed <= reach &&
                           share * threads <= panels + panels / 16 && (!Micro::TILES || N > 2 * M);
    plan.own_b = by_panels ? 3 : 0;
    while (plan.own_b > 1 && up(up(panels, plan.own_b), threads) * plan.own_b > share) --plan.own_b;

    if (Micro::TILES)
        plan.fetch = !plan.own_b && plan.nc * packed > L2 / 2;
    else
        plan.fetch = WIDE && (!plan.own_b || (!p.packed && N * K >= 1 << 17));
    return plan;
}

template <class Word>
struct Block {
    using Micro = MicroKernel<Word>;
    static constexpr long ROWS = Micro::ROWS;
    const Product& p;
    const Plan plan;
    float *packed_a, *packed_b;
    long n0, nc, k0, kc;  // columns n0 .. n0 + nc, depth k0 .. k0 + kc

    long words() const { return words_of<Word>(kc); }
    long rows(long m) const { return min(plan.mc, p.M - m * plan.mc); }  // of row block m
    long a_size() const { return plan.mc / ROWS * panel_size<Word>(ROWS, words()); }

    const float* a_from(long m) const {  // where row block m begins
        const long m0 = m * plan.mc;
        return p.A + (p.transpose_a ? k0 * p.lda + m0 : m0 * p.lda + k0);
    }
    const float* b_from(long n, long k) const {  // where column n begins, at depth k
        return p.B + (p.transpose_b ? (n0 + n) * p.ldb + k0 + k : (k0 + k) * p.ldb + n0 + n);
    }

    bool packs_b() const { return plan.pack_b && !p.packed; }

    void pack_rows(long m, float* dst) const {
        if (p.transpose_a)
            Micro::pack_across(a_from(m), p.lda, rows(m), kc, dst);
        else
            Micro::pack_along(a_from(m), p.lda, rows(m), kc, dst);
    }

    // Columns n .. n + count of this block's B, depth k .. k + depth of it, into their panels.
    void pack_columns(long n, long count, long k, long depth, float* dst) const {
        if (p.transpose_b)
            pack_along_k<Word, NR>(b_from(n, k), p.ldb, count, depth, dst);
        else
            pack_across_k<Word, NR>(b_from(n, k), p.ldb, count, depth, dst, k / Word::PER_WORD,
                                    words());
    }
    // Shared packing reads whole rows as they lie in memory: some panels, or DEPTH values of k.
    static constexpr long DEPTH = 64, COLUMNS = 3 * NR;
    long b_tasks() const { return p.transpose_b ? up(nc, COLUMNS) : up(kc, DEPTH); }
    void pack_b(long task) const {
        const long n = task * COLUMNS, k = task * DEPTH;
        if (p.transpose_b)
            pack_columns(n, min(COLUMNS, nc - n), 0, kc,
                         packed_b + n / NR * panel_size<Word>(NR, words()));
        else
            pack_columns(0, nc, k, min(DEPTH, kc - k), packed_b);
    }

    // Where panel j of this block lies in the whole of B, packed once: by depth, then by columns.
    long packed_at(long j) const {
        const long all = up(p.N, NR), words_before = words_of<Word>(plan.kc);
        return k0 / plan.kc * all * panel_size<Word>(NR, words_before) +
               (n0 / NR + j) * panel_size<Word>(NR, words());
    }

    // The share that tile i fetches of `rows` stored rows, `length` floats of each.
    Fetch share(long i, const float* from, long ld, long rows, long length) const {
        const long lines = max(up(length, LINE), 1), row = i * words() / lines;
        const long line = i * words() % lines;
        if (row >= rows) return {from};
        return {from + row * ld + line * LINE, line, lines, ld - lines * LINE};
    }
    Fetch share_of_rows(long i, long m) const {
        if (m >= plan.row_blocks) return {p.A};
        return p.transpose_a ? share(i, a_from(m), p.lda, kc, rows(m))
                             : share(i, a_from(m), p.lda, rows(m), kc);
    }
    Fetch share_of_panel(long i, long j) const {  // after the last: of the next block of depth
        const long panels = up(nc, NR), k = j < panels ? 0 : kc, n = (k ? j - panels : j) * NR;
        const long columns = min(NR, nc - n), depth = min(kc, p.K - k0 - k);
        if (columns <= 0 || depth <= 0) return {p.B};
        return p.transpose_b ? share(i, b_from(n, k), p.ldb, columns, depth)
                             : share(i, b_from(n, k), p.ldb, depth, columns);
    }

    Fetch share_of_packed(long i, const float* panel) const {
        constexpr long LINES = 24;  // that multiply_tiles() fetches with each group
        const long at = i * LINES * LINE * (words() / Word::GROUP);
        return at < panel_size<Word>(NR, words()) ? Fetch{panel + at, 0, 1, 0} : Fetch{panel};
    }

    // Row block m times `count` panels of B, of which the first is number j of this block.
    // next(i, j) is the share of tile i of panel j.
    template <class Next>
    void multiply(long m, const float* a, long j, long count, const float* b, Next next) const {
        Walk walk = {words(), 1, ROWS, NR, p.ldc, p.add || k0 > 0};  // where both are packed
        long next_a = panel_size<Word>(ROWS, words()), next_b = panel_size<Word>(NR, words());
        if (!plan.pack_a) {
            walk.row = p.transpose_a ? 1 : p.lda, walk.step = p.transpose_a ? p.lda : 1;
            a = a_from(m), next_a = ROWS * walk.row;
        }
        if (!plan.pack_b && !p.packed) walk.ldb = p.ldb, b = b_from(j * NR, 0), next_b = NR;
        for (const long end = j + count; j < end; ++j, b += next_b)
            for (long i = 0; i < up(rows(m), ROWS); ++i) {
                const long n = j * NR, row = i * ROWS;
                const Fetch share = plan.fetch ? next(i, j) : Fetch{b};
                Micro::multiply(min(ROWS, rows(m) - row), walk, a + i * next_a, b,
                                p.C + (m * plan.mc + row) * p.ldc + n0 + n, min(NR, nc - n),
                                p.bias && k0 == 0 ? p.bias + n0 + n : nullptr,
                                plan.fetch ? &share : nullptr);
            }
    }

    void run() const {  // by every thread of the team
        const long panels = up(nc, NR), b_size = panel_size<Word>(NR, words());
        const long tiles = plan.mc / ROWS;  // of a row block, in one panel
        const long team = THREAD_COUNT, me = THREAD_INDEX;
        if (plan.own_b) {
            if (plan.pack_a) {
#pragma omp for schedule(dynamic)
                for (long m = 0; m < plan.row_blocks; ++m) pack_rows(m, packed_a + m * a_size());
            }
            float* mine = packed_b + me * plan.own_b * b_size;
#pragma omp for schedule(dynamic)
            for (long j = 0; j < panels; j += plan.own_b) {
                const long count = min(plan.own_b, panels - j);
                const float* b = p.packed ? p.packed + packed_at(j) : mine;
                if (packs_b()) pack_columns(j * NR, min(count * NR, nc - j * NR), 0, kc, mine);
                for (long m = 0; m < plan.row_blocks; ++m)
                    multiply(m, packed_a + m * a_size(), j, count, b, [&](long i, long j) {
                        return share_of_panel(m * tiles + i, j + team * plan.own_b);
                    });
            }
        } else {
            const float* b = p.packed ? p.packed + packed_at(0) : packed_b;
            if (packs_b()) {
#pragma omp for schedule(dynamic)
                for (long t = 0; t < b_tasks(); ++t) pack_b(t);
            }
            float* mine = packed_a + me * a_size();
#pragma omp for schedule(dynamic)
            for (long m = 0; m < plan.row_blocks; ++m) {
                if (plan.pack_a) pack_rows(m, mine);
                multiply(m, mine, 0, panels, b, [&](long i, long j) {
                    return Micro::TILES ? share_of_packed(i, b + (j + 1) * b_size)
                                        : share_of_rows(j * tiles + i, m + team);
                });
            }
        }
    }
};

template <class Word>
static void multiply(const Product& p, int threads) {
    using Micro = MicroKernel<Word>;
    const Plan plan = plan_for<Word>(p, threads);
    const long words = words_of<Word>(plan.kc);
    const long a_blocks = !plan.pack_a ? 0 : plan.own_b ? plan.row_blocks : threads;
    const long b_panels = !plan.pack_b || p.packed ? 0
                          : plan.own_b             ? threads * plan.own_b
                                                   : plan.nc / NR;
    Scratch a(a_blocks * (plan.mc / Micro::ROWS) * panel_size<Word>(Micro::ROWS, words));
    Scratch b(b_panels * panel_size<Word>(NR, words));
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] const typename Word::Unit unit{};
        for (long n0 = 0; n0 < p.N; n0 += plan.nc)
            for (long k0 = 0; k0 == 0 || k0 < p.K; k0 += plan.kc) {  // once if K is 0: writes zeros
                const long nc = min(plan.nc, p.N - n0), kc = min(plan.kc, p.K - k0);
                Block<Word>{p, plan, a.data, b.data, n0, nc, k0, kc}.run();
            }
    }
}

template <class Word>
static long packed_size_of(const Product& p) {
    const Plan plan = plan_for<Word>(p, 1);
    const long last = max(p.K - 1, 0) / plan.kc * plan.kc;  // where the last block of depth begins
    return Block<Word>{p, plan, nullptr, nullptr, 0, p.N, last, p.K - last}.packed_at(up(p.N, NR));
}

template <class Word>
static void pack_whole(const Product& p, float* packed, int threads) {
    const Plan plan = plan_for<Word>(p, 1);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < p.N; n += NR)
        for (long k0 = 0; k0 < p.K; k0 += plan.kc) {
            const Block<Word> block{p, plan, nullptr, nullptr, 0, p.N, k0, min(plan.kc, p.K - k0)};
            block.pack_columns(n, min(NR, p.N - n), 0, block.kc, packed + block.packed_at(n / NR));
        }
}

// f(the word that p is multiplied in): for tiles float32 is split, which takes some rows to pay.
template <class F>
INLINE auto in_words_for([[maybe_unused]] const Product& p, F f) {
#if defined(__AMX_BF16__)
    const bool pays = p.M >= (p.transpose_a ? 128 : 32) && p.M * p.N * p.K >= 1 << 20;
    if (pays && !bfloat16_products) return f(Thirds{});
#endif
    return in_words(f);
}

static void matmul(const Product& p, int threads) {
    const bool few = p.M <= FEW_ROWS && !p.transpose_a;
    if (few && !(p.packed && bfloat16_products))
        return p.transpose_b ? few_rows_by_dots(p, threads) : few_rows_by_sums(p, threads);
    in_words_for(p, [&](auto word) { multiply<decltype(word)>(p, threads); });
}

static long packed_size(const Product& p) {
    return in_words_for(p, [&](auto word) { return packed_size_of<decltype(word)>(p); });
}

static void pack(const Product& p, float* packed, int threads) {
    in_words_for(p, [&](auto word) { pack_whole<decltype(word)>(p, packed, threads); });
}
}  // namespace ISA
