// emulator.h - CUDA on a CPU, for tests: the unchanged .cu text is compiled behind this header.
//
// A thread of a block is a fiber: it has its own stack and runs until it waits, for the block
// (__syncthreads) or for its warp (a shuffle). Blocks run one after the other, so that __shared__
// is simply static. What this finds that a GPU would not tell:
//
//   a missing barrier   Warps run as far as they can, one after another: `order` says whether first
//                       to last, last to first, or shuffled. A kernel that needs an order which it
//                       does not enforce gives another result in one of them.
//   divergence          A barrier that some threads of the block, or lanes of the warp, never reach
//                       ends the process with the kernel's name and where its threads are.
//   stale memory        Dynamic shared memory begins as NaNs in every block.
//   overruns            Compiled with -fsanitize=address, an access out of bounds names its line.
//
// It does not know: caches, alignment, memory ordering between blocks, or how fast anything is.
#define _XOPEN_SOURCE 700  // or macOS has no ucontext
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
extern "C" void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
// The compiler's own jumps: before each of the C library's AddressSanitizer asks the system where
// the stacks are, and it would before these, were they not hidden from it.
__attribute__((noipa, no_sanitize("address"))) inline void jump(void** at) {
    __builtin_longjmp(at, 1);
}
#undef _setjmp
#define _setjmp(at) __builtin_setjmp((void**)(at))
#define _longjmp(at, value) jump((void**)(at))
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {
constexpr int LANES = 32;
constexpr size_t STACK = 64 << 10;

struct Meeting {  // of the threads of a block, or of a warp
    int expected = 0, arrived = 0, held = 0;
};
struct Warp {
    Meeting meeting;
    uint64_t shown[2][LANES];  // what lanes show each other, by turns
};
struct Fiber {
    dim3 thread;
    int lane;
    Warp* warp;
    Meeting* awaited;  // null: can run
    int held_then, turn;
    bool done, begun = false;
    jmp_buf at;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    void* sanitizer = nullptr;
};

inline const char* kernel = "";
inline int order = 0;      // 0 first to last, 1 last to first, 2 shuffled
inline int left_out = -1;  // the number of a barrier that is skipped, to see whether that shows
inline dim3 grid, block, block_index;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Warp> warps;
inline std::vector<float> shared;
inline Meeting everyone;
inline Fiber* current;
inline jmp_buf scheduler;
inline const std::function<void()>* body;
inline void* scheduler_sanitizer;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;

inline void leaving(void** save, const void* bottom, size_t size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(save, bottom, size);
#endif
}
inline void arrived(void* save, const void** bottom, size_t* size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(save, bottom, size);
#endif
}

[[noreturn]] inline void die(const char* what) {
    fprintf(stderr, "emulator: %s in %s, block (%u, %u, %u):", what, kernel, block_index.x,
            block_index.y, block_index.z);
    for (auto& f : fibers)
        if (f->done || f->awaited)
            fprintf(stderr, " %u:%s", f->thread.x,
                    f->done                   ? "ended"
                    : f->awaited == &everyone ? "at __syncthreads"
                                              : "in its warp");
    fprintf(stderr, "\n");
    abort();
}

// Back to the scheduler; returns when it lets this fiber go on.
inline void pause() {
    Fiber* self = current;
    if (_setjmp(self->at) == 0) {
        leaving(&self->sanitizer, scheduler_stack, scheduler_stack_size);
        _longjmp(scheduler, 1);
    }
    arrived(self->sanitizer, &scheduler_stack, &scheduler_stack_size);
}

inline void meet(Meeting& meeting) {  // whoever comes last opens it
    if (++meeting.arrived == meeting.expected) {
        meeting.arrived = 0;
        ++meeting.held;
        return;
    }
    current->awaited = &meeting;
    current->held_then = meeting.held;
    pause();
}

inline void live() {  // a fiber serves block after block
    arrived(nullptr, &scheduler_stack, &scheduler_stack_size);
    for (;;) {
        (*body)();
        current->done = true;
        pause();
    }
}

inline void let_run(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler) == 0) {
        leaving(&scheduler_sanitizer, fiber.stack.get(), STACK);
        if (fiber.begun) _longjmp(fiber.at, 1);
        fiber.begun = true;
        setcontext(&fiber.context);
    }
    arrived(scheduler_sanitizer, nullptr, nullptr);
}

inline bool can_run(Fiber& fiber) {
    if (fiber.done) return false;
    if (fiber.awaited && fiber.awaited->held == fiber.held_then) return false;
    fiber.awaited = nullptr;
    return true;
}

inline void make_fibers(int threads) {
    if ((int)fibers.size() == threads) return;
    fibers.clear();
    warps.assign((threads + LANES - 1) / LANES, Warp());
    for (int i = 0; i < threads; ++i) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& f = *fibers[i];
        f.thread = {unsigned(i), 0, 0};
        f.lane = i % LANES;
        f.warp = &warps[i / LANES];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, live, 0);
    }
}

inline void run_block(int threads) {
    static std::mt19937 random(1);
    everyone = {threads, 0, 0};
    for (Warp& w : warps)
        w.meeting = {std::min(LANES, threads - int(&w - &warps[0]) * LANES), 0, 0};
    for (auto& f : fibers) f->done = false, f->awaited = nullptr, f->turn = 0;
    std::fill(shared.begin(), shared.end(), NAN);
    std::vector<int> turns(warps.size());
    for (size_t i = 0; i < turns.size(); ++i) turns[i] = order == 1 ? turns.size() - 1 - i : i;
    if (order == 2) std::shuffle(turns.begin(), turns.end(), random);

    for (bool moved = true; moved;) {
        moved = false;
        for (int w : turns)
            for (bool again = true; again;) {  // this warp, as far as it can
                again = false;
                for (int i = w * LANES; i < std::min(threads, (w + 1) * LANES); ++i)
                    if (can_run(*fibers[i])) let_run(*fibers[i]), again = moved = true;
            }
    }
    for (auto& f : fibers)
        if (!f->done) die("a barrier that not all reach");
}

inline void run(const char* name, const unsigned* size, size_t bytes,
                const std::function<void()>& call) {
    kernel = name;
    grid = {size[0], size[1], size[2]};
    block = {size[3], 1, 1};
    body = &call;
    shared.resize(bytes / sizeof(float));
    make_fibers(size[3]);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) block_index = {x, y, z}, run_block(size[3]);
}

// What kind of argument: a pointer, an integer, a float; others do not compile.
template <class T>
constexpr char kind(T*) {
    return 'p';
}
constexpr char kind(long long) { return 'i'; }
constexpr char kind(float) { return 'f'; }

template <class... A, size_t... I>
void launch(const char* name, void (*kernel)(A...), const unsigned* size, size_t bytes,
            void** given, std::index_sequence<I...>) {
    run(name, size, bytes, [=] { kernel(*(A*)given[I]...); });
}
template <class... A>
const char* enter(const char* name, void (*kernel)(A...), const unsigned* size, size_t bytes,
                  void** given) {
    static const char kinds[] = {kind(A())..., 0};
    if (size) launch(name, kernel, size, bytes, given, std::index_sequence_for<A...>());
    return kinds;
}

template <class T>
T from_lane(T x, int lane) {  // two rows of slots, by turns: one meeting is enough
    Fiber* self = current;
    uint64_t* shown = self->warp->shown[self->turn ^= 1];
    memcpy(&shown[self->lane], &x, sizeof x);
    meet(self->warp->meeting);
    memcpy(&x, &shown[lane], sizeof x);
    return x;
}
inline unsigned votes(bool mine) {
    uint64_t* shown = current->warp->shown[current->turn ^= 1];
    shown[current->lane] = mine;
    meet(current->warp->meeting);
    unsigned all = 0;
    for (int lane = 0; lane < LANES; ++lane) all |= unsigned(shown[lane]) << lane;
    return all;
}
template <class To, class From>
To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &x, sizeof to);
    return to;
}
}  // namespace emulator

// Called by Python; without a size it only tells the kinds of the arguments.
#define EXPORT(name)                                                                          \
    extern "C" const char* emulate_##name(const unsigned* size, size_t bytes, void** given) { \
        return emulator::enter(#name, name, size, bytes, given);                              \
    }
extern "C" __attribute__((used)) inline void set_order(int order) { emulator::order = order; }
extern "C" __attribute__((used)) inline void leave_out(int barrier) {
    emulator::left_out = barrier;
}
#define BARRIER(number, wait) (emulator::left_out == number ? (void)0 : wait)

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block)
#define gridDim (emulator::grid)
#define DYNAMIC_SHARED(name) float* name = emulator::shared.data()

inline void __syncthreads() { emulator::meet(emulator::everyone); }
inline int __syncthreads_or(int mine) {
    static bool any[2];  // by turns, so that the next one does not overwrite what is still read
    const int turn = emulator::everyone.held & 1;
    if (emulator::everyone.arrived == 0) any[turn] = false;
    any[turn] |= mine != 0;
    emulator::meet(emulator::everyone);
    return any[turn];
}
inline void __syncwarp() { emulator::meet(emulator::current->warp->meeting); }
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulator::from_lane(x, emulator::current->lane ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
    return emulator::from_lane(x, lane);
}
inline unsigned __ballot_sync(unsigned, bool mine) { return emulator::votes(mine); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long old,
                                    unsigned long long next) {
    const unsigned long long found = *at;
    if (found == old) *at = next;
    return found;
}
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
