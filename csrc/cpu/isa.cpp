// isa.cpp - which of the tables that were compiled the processor runs (setup.py passes
// -DTABLES=..., best first).
#include <string>
#include <vector>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include "kernels.h"

// Whether the processor has tiles, and Linux lets this process use their 8 KB a thread.
[[maybe_unused]] static bool have_tiles() {
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

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found;
    for (const Kernels* k : {TABLES})
        if (runs_here(k->name)) found.push_back(k);
    return found;
}
