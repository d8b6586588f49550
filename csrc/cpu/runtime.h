// runtime.h - what the kernels run on: instruction set, threads, memory; and staying alive after
// fork.
#pragma once
#include <pthread.h>
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#ifdef _OPENMP
#include <omp.h>
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

std::vector<const Kernels*> supported();  // the tables that run here, best first (isa.cpp)

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

// Physical cores that this process may use: of hyperthreads that share a core, one counts; of a
// Mac's only the fast ones, since all threads of a kernel wait for the last.
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
#elif defined(__APPLE__)
    for (const char* name : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {  // or all are alike
        int cores = 0;
        size_t size = sizeof cores;
        if (sysctlbyname(name, &cores, &size, nullptr, 0) == 0 && cores > 0) return cores;
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

// One thread for each of these cores, unless the environment or a container (docker --cpus) allows
// fewer: threads that together exceed its share are all stopped until the next 0.1 s.
static int default_threads() {
    int n = available_cores();
#ifdef _OPENMP
    n = std::max(n, omp_get_num_places());  // where OMP_PROC_BIND has bound this thread to one
#endif
    const char* limit = std::getenv("OMP_NUM_THREADS");
    if (limit && std::atoi(limit) > 0) n = std::min(n, std::atoi(limit));
    double time, period;  // where there is no limit, the file begins with "max", or is missing
    if (std::ifstream("/sys/fs/cgroup/cpu.max") >> time >> period)
        n = std::min(n, std::max(1, int(time / period)));
    return PARALLEL ? n : 1;
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
