// The threads of the native kernels.
//
//     run(threads, [&](member &self) {            the caller and helpers, all of them in the same phases
//         if (!self.each(rows, [&](int64_t first, int64_t last) { ... })) return;
//         if (!self.each(panels, ...)) return;    what the phase before wrote is there
//     });
//
// A phase has n pieces. Every member has a share of them, takes some from its front at a time and then helps with the
// shares of the others, so that a member whose core is slow, or away with another process, delays the rest by what it
// holds and no more. A phase ends when its pieces are done, not when the members meet: one that comes late finds the
// phases that are over and passes them by. The caller is a member of its own call and needs no helper, so any number
// of calls can run at once, from any thread; helpers go to whoever asks first.
//
// Whoever waits spins for some microseconds and then sleeps. A helper that kept a call waiting for a good part of its
// time is left out of the next ones for some multiple of what was lost: where another process has its core, one thread
// less is faster.
//
// Compiled into every instruction set, so all of it is inlined; what need not be is in pool.cpp.
#pragma once

#include <atomic>
#include <stdint.h>

namespace bn {

#define BN_ALWAYS static inline __attribute__((always_inline))

struct helper;
struct member;

// A member's share of the pieces, and how far the member is.
struct alignas(64) seat {
    std::atomic<uint64_t> taken;              // phase << 32 | count; of an earlier phase, it counts as none
    std::atomic<uint32_t> began, handed_in;   // the last phases in which it took pieces, and in which it had done them
    helper *by;
    int64_t lost; // nanoseconds that the caller waited for it while it did not run
};

// What the members of a call share. It outlives the call until the last helper has let go of it.
struct team {
    alignas(64) std::atomic<uint32_t> phase;  // from 1 on
    std::atomic<uint32_t> sleeping;           // how many wait for the next one in the kernel
    alignas(64) std::atomic<int64_t> done;    // pieces of the phase
    alignas(64) std::atomic<uint32_t> inside; // helpers that may touch the caller's memory; OVER: no other may begin to
    std::atomic<uint32_t> references;
    int threads;
    void *context;
    void (*body)(void *context, member &self);
    seat *seats;
};

struct member {
    team *of;
    int id, threads;
    uint32_t phase;

    template <class F> bool each(int64_t n, F work);
    // `prepare()` runs on every member that goes on to take a piece, for what each needs a copy of.
    template <class P, class F> bool each(int64_t n, P prepare, F work);
};

// pool.cpp
void pool_run(int threads, void (*body)(void *, member &), void *context);
bool pool_wait(member &self); // for the phase to end; false: the call is over, return at once
void pool_wake(team &of);     // those that sleep in pool_wait

BN_ALWAYS void pool_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

template <class F> BN_ALWAYS void run(int threads, F body) {
    pool_run(threads, [](void *context, member &self) { (*(F *)context)(self); }, &body);
}

// Some pieces from the front of a share of the phase: how many, from `*first` on; 0 when it has none left.
BN_ALWAYS int64_t take(const member &self, int share, int64_t n, int64_t *first) {
    int64_t begin = n * share / self.threads, size = n * (share + 1) / self.threads - begin;
    if (!size) return 0; // its word belongs to an earlier phase
    std::atomic<uint64_t> &word = self.of->seats[share].taken;
    uint64_t seen = word.load(std::memory_order_acquire);
    for (;;) {
        int32_t ahead = (int32_t)((uint32_t)(seen >> 32) - self.phase);
        int64_t taken = ahead < 0 ? 0 : (int64_t)(uint32_t)seen;
        if (ahead > 0 || taken >= size) return 0;
        int64_t count = (size - taken + 3) / 4; // fewer towards the end, so that all end together
        uint64_t next = (uint64_t)self.phase << 32 | (uint64_t)(taken + count);
        if (word.compare_exchange_weak(seen, next, std::memory_order_acq_rel, std::memory_order_acquire)) {
            *first = begin + taken;
            return count;
        }
    }
}

template <class P, class F> BN_ALWAYS bool phase_of(member &self, int64_t n, P &prepare, F &work) {
    if (self.threads == 1) {
        prepare();
        work((int64_t)0, n);
        return true;
    }
    team &of = *self.of;
    if (n && of.phase.load(std::memory_order_acquire) == self.phase) {
        prepare();
        int64_t finished = 0;
        of.seats[self.id].began.store(self.phase, std::memory_order_relaxed);
        for (int i = 0; i < self.threads; i++) {
            int share = self.id + i < self.threads ? self.id + i : self.id + i - self.threads;
            int64_t first, count;
            while ((count = take(self, share, n, &first))) {
                work(first, first + count);
                finished += count;
            }
        }
        of.seats[self.id].handed_in.store(self.phase, std::memory_order_relaxed);
        if (finished && of.done.fetch_add(finished, std::memory_order_acq_rel) + finished == n) {
            of.done.store(0, std::memory_order_relaxed);
            of.phase.store(self.phase + 1, std::memory_order_seq_cst);
            if (of.sleeping.load(std::memory_order_seq_cst)) pool_wake(of);
        }
        for (int spins = 0; of.phase.load(std::memory_order_acquire) == self.phase; spins++) {
            if (spins == 64) {
                if (!pool_wait(self)) return false;
                break;
            }
            pool_pause();
        }
    }
    self.phase += n > 0; // a phase without pieces is none, to all members alike
    return true;
}

template <class P, class F> inline __attribute__((always_inline)) bool member::each(int64_t n, P prepare, F work) {
    return phase_of(*this, n, prepare, work);
}

template <class F> inline __attribute__((always_inline)) bool member::each(int64_t n, F work) {
    auto nothing = [] {};
    return phase_of(*this, n, nothing, work);
}

// work(i) for every i below n, by up to `threads` threads.
template <class F> BN_ALWAYS void share_out(int threads, int64_t n, F work) {
    run(threads, [&](member &self) {
        self.each(n, [&](int64_t first, int64_t last) {
            for (; first < last; first++) work(first);
        });
    });
}

} // namespace bn
