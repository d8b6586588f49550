// runtime.h - what the kernels run on: instruction set, threads, memory; and staying alive after
// fork.
#pragma once
#include <pthread.h>
#include <cstdlib>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include "kernels.h"
#include "pool.h"

// ---- memory: never destroyed, since arrays may outlive the module ------------------------------

static Pool& pool = *new Pool;

float* take_scratch(size_t floats) {
    return static_cast<float*>(pool.take(floats * sizeof(float)));
}
void give_scratch(float* p, size_t floats) { pool.give(p, floats * sizeof(float)); }
void out_of_memory() { throw std::bad_alloc(); }

// ---- instruction set ---------------------------------------------------------------------------

// Whether the processor has tiles, and Linux lets this process use their 8 KB a thread.
static bool have_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, features = 0;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
    constexpr long ASK_FOR_STATE = 0x1023, TILE_DATA = 18;
    return __get_cpuid_count(7, 0, &a, &b, &c, &features) && (features & BF16) &&
           (features & TILE) && syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
#else
    return false;
#endif
}

static bool runs_here(const std::string& isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == "avx512") return avx512;
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (isa == "avx512bf16") return bf16;
    if (isa == "amx") return bf16 && have_tiles();
#endif
    return isa == "baseline";
}

static std::vector<const Kernels*> supported() {  // best first
    std::vector<const Kernels*> found;
    for (const Kernels* k : {
#ifdef HAVE_AMX
             &kernels_amx,
#endif
#ifdef HAVE_AVX512BF16
             &kernels_avx512bf16,
#endif
#ifdef HAVE_AVX512
             &kernels_avx512,
#endif
#ifdef HAVE_AVX2
             &kernels_avx2,
#endif
             &kernels_baseline})
        if (runs_here(k->name)) found.push_back(k);
    return found;
}

static const Kernels* find_isa(const std::string& name, const std::string& who) {
    std::string names;
    for (const Kernels* k : supported()) {
        if (name == k->name) return k;
        names += (names.empty() ? "" : ", ") + std::string(k->name);
    }
    throw std::invalid_argument("[" + who + "] this machine supports " + names + "; got \"" + name +
                                "\"");
}

static const Kernels* chosen = nullptr;

// The table in use. The first call chooses it: TINYLM_ISA where set, else the best. (Not at import:
// an exception there reaches Python as an ImportError, which means "not built".)
static const Kernels& kernels() {
    if (!chosen) {
        const char* wish = std::getenv("TINYLM_ISA");
        chosen = wish && *wish ? find_isa(wish, "TINYLM_ISA") : supported().front();
    }
    return *chosen;
}

// ---- precision of products ---------------------------------------------------------------------

bool bfloat16_products = false;

static void use_isa(const std::string& name) {
    chosen = find_isa(name, "use_isa");
    bfloat16_products = false;  // the other set may not have them
}

static void set_products(const std::string& dtype) {
    if (dtype != "float32" && dtype != "bfloat16")
        throw std::invalid_argument("[set_products] dtype: expected float32 or bfloat16, got " +
                                    dtype);
    if (dtype == "bfloat16" && !kernels().bfloat16)
        throw std::invalid_argument(
            "[set_products] bfloat16 needs the instruction set avx512bf16; in use is " +
            std::string(kernels().name));
    bfloat16_products = dtype == "bfloat16";
}

// ---- threads -----------------------------------------------------------------------------------

// Physical cores that this process may use: of hyperthreads that share a core, one counts.
static int available_cores() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        std::set<std::string> cores;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                               "/topology/thread_siblings_list");
            std::string siblings = "cpu" + std::to_string(cpu);  // where the file is missing
            std::getline(file, siblings);
            cores.insert(siblings);
        }
        return cores.size();
    }
#endif
    const int n = std::thread::hardware_concurrency();
    return n > 0 ? n : 1;
}

#ifdef _OPENMP
constexpr bool PARALLEL = true;
#else
constexpr bool PARALLEL = false;
#endif

static int default_threads() {
    const char* limit = std::getenv("OMP_NUM_THREADS");
    const int cores = available_cores(), n = limit ? std::atoi(limit) : 0;
    return !PARALLEL ? 1 : n > 0 && n < cores ? n : cores;
}

static int threads = default_threads();
static bool forked = false;

static void set_threads(int n) {
    if (n < 1)
        throw std::invalid_argument("[set_threads] n: expected at least 1, got " +
                                    std::to_string(n));
    if (PARALLEL && !forked) threads = n;
}

// Threads for a kernel that does `work` operations: below 32768 waking a second one costs more than
// it brings (a parallel region: 0.45 us, and more where cores are busy).
static int threads_for(double work) { return work < 32768 ? 1 : threads; }

// A child of fork has none of its parent's threads, and libgomp would wait for them for ever: the
// child runs on one thread. The pool's lock is held across the fork, so that it is whole in both.
static void survive_fork() {
    pthread_atfork([] { pool.lock.lock(); }, [] { pool.lock.unlock(); },
                   [] {
                       pool.lock.unlock();
                       threads = 1;
                       forked = true;
                   });
}
