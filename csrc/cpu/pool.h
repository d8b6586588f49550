// pool.h - memory for arrays, kept and reused: a training step asks the system for nothing.
//
// Writing 64 MB for the first time costs 4.1 ms in page faults, writing it again 2.3 ms (Zen 5).
//
// All of it is one range of addresses, reserved at the start, with memory behind it up to the top:
//
//     base                                     top                                  end
//      | in use | idle | in use | idle | in use |  reserved, nothing behind it . . . |
//
// An array gets the smallest idle stretch that holds it (best fit, the lowest of several), and what
// is left of that stays idle. An array that is given back joins the idle stretches beside it. So
// gradients come to lie where activations lay.
#pragma once
#include <sys/mman.h>
#include <unistd.h>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <utility>
#ifndef POOL_KEEPS_NOTHING  // 1 for a sanitizer, so that it sees each array's end and its death
#define POOL_KEEPS_NOTHING 0
#endif

class Pool {
    static constexpr size_t LINE = 64, STEP = size_t(2) << 20;
    char *base = nullptr, *top = nullptr, *backed = nullptr, *end = nullptr;
    std::map<char*, size_t> idle;                // each idle stretch: where, bytes
    std::set<std::pair<size_t, char*>> by_size;  // and the other way round

    static size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

    void reserve() {  // twice as much as the machine has, or else half of what the system allows
        size_t all = 4 * size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
        const int flags = MAP_PRIVATE | MAP_ANON | MAP_NORESERVE;
        void* p;
        while ((p = mmap(nullptr, all, PROT_NONE, flags, -1, 0)) == MAP_FAILED && all > 4 * STEP)
            all -= all / 8;
        if (p == MAP_FAILED) throw std::bad_alloc();
        const size_t bytes = rounded(all / 2, STEP);
        munmap(static_cast<char*>(p) + bytes, all - bytes);  // for everybody else
        base = top = backed = reinterpret_cast<char*>(rounded(reinterpret_cast<size_t>(p), STEP));
        end = base + (bytes / STEP - 1) * STEP;
#ifdef MADV_HUGEPAGE
        madvise(base, end - base, MADV_HUGEPAGE);
#endif
    }
    void grow(size_t size) {  // so that the last idle stretch has so many bytes
        if (!base) reserve();
        const bool last = !idle.empty() && idle.rbegin()->first + idle.rbegin()->second == top;
        char* const from = last ? idle.rbegin()->first : top;
        if (size > size_t(end - from)) throw std::bad_alloc();
        if (from + size > backed) {
            const size_t more = rounded(from + size - backed, STEP);
            if (mprotect(backed, more, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
            backed += more;
        }
        char* const before = top;
        top = from + size;
        join(before, top - before);
    }
    void join(char* p, size_t size) {  // an idle stretch more, one with those beside it
        auto next = idle.lower_bound(p);
        if (next != idle.end() && p + size == next->first) {
            size += next->second;
            next = forget(next);
        }
        if (next != idle.begin() && std::prev(next)->first + std::prev(next)->second == p) {
            p = std::prev(next)->first;
            size += std::prev(next)->second;
            forget(std::prev(next));
        }
        idle[p] = size;
        by_size.insert({size, p});
    }
    std::map<char*, size_t>::iterator forget(std::map<char*, size_t>::iterator stretch) {
        by_size.erase({stretch->second, stretch->first});
        return idle.erase(stretch);
    }

public:
    std::mutex lock;

    void* take(size_t bytes) {
        const size_t size = rounded(bytes + !bytes, LINE);
        if (POOL_KEEPS_NOTHING) {
            void* p = nullptr;
            if (posix_memalign(&p, LINE, size)) throw std::bad_alloc();
            return p;
        }
        std::lock_guard<std::mutex> hold(lock);
        auto fit = by_size.lower_bound({size, nullptr});
        if (fit == by_size.end()) {
            grow(size);
            fit = by_size.lower_bound({size, nullptr});
        }
        const auto [found, p] = *fit;
        forget(idle.find(p));
        if (found > size) join(p + size, found - size);
        return p;
    }
    void give(void* p, size_t bytes) {
        if (POOL_KEEPS_NOTHING) return std::free(p);
        std::lock_guard<std::mutex> hold(lock);
        join(static_cast<char*>(p), rounded(bytes + !bytes, LINE));
    }
    size_t bytes() {  // in use and idle
        std::lock_guard<std::mutex> hold(lock);
        return top - base;
    }
};
