// Helpers: how they start, sleep, are given to calls and let go.
#include "pool.h"

#include <chrono>
#include <mutex>
#include <new>
#include <stdlib.h>
#include <string.h>
#include <thread>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#endif
#if defined(__unix__) || defined(__APPLE__)
#define BN_POSIX
#include <pthread.h>
#include <signal.h>
#include <time.h>
#endif

namespace bn {

namespace {

enum { MOST_HELPERS = 1024 };
const uint32_t OVER = 1u << 31;
const int64_t SPIN = 20000;        // nanoseconds of spinning before a member sleeps
const int64_t IDLE_SPIN = 150000;  // and before a helper without a call does: about what Python takes between steps
const int64_t LOSS = 200000;       // nanoseconds that a call may wait for a helper without further notice
const int64_t PENALTY = 64;        // times its loss is how long it is then left out at most: a 64th is what it can cost
const int64_t LONGEST = 500000000; // but no longer than this

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

#if defined(__linux__)
void sleep_while(std::atomic<uint32_t> &word, uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake(std::atomic<uint32_t> &word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0); }
#else
// One place where everybody sleeps. Leaked, because helpers still sleep there when the process ends.
struct bed {
    std::mutex lock;
    std::condition_variable changed;
};
bed *sleepers = new bed;
void sleep_while(std::atomic<uint32_t> &word, uint32_t value) {
    std::unique_lock<std::mutex> held(sleepers->lock);
    if (word.load(std::memory_order_seq_cst) == value) sleepers->changed.wait(held);
}
void wake(std::atomic<uint32_t> &) {
    std::lock_guard<std::mutex> held(sleepers->lock);
    sleepers->changed.notify_all();
}
#endif

struct pool {
    std::mutex growing;
    std::atomic<int> count{0}; // of helpers
    std::atomic<int> busy{0};  // members of all calls
    helper *helpers[MOST_HELPERS] = {};
};
pool *all = new pool; // leaked, for the same reason

} // namespace

// A thread that works for calls.
struct helper {
    alignas(64) std::atomic<team *> work{nullptr};
    std::atomic<bool> claimed{false};           // by a caller, until it is done with the call
    std::atomic<uint32_t> signal{0}, asleep{0}; // signal: counts the calls it was given
    std::atomic<int64_t> away{0};               // not before this time
    std::atomic<int64_t> times{1};              // for how many times its loss it was left out the last time
    std::atomic<bool> has_clock{false};
    int id = 0; // in the team
    pool *home = nullptr;
#if defined(BN_POSIX) && !defined(__APPLE__)
    clockid_t clock;
#endif
};

namespace {

// Nanoseconds that a helper has run so far, -1 where the system does not tell.
int64_t run_time(const helper &of) {
#if defined(BN_POSIX) && !defined(__APPLE__)
    timespec t;
    if (of.has_clock.load(std::memory_order_acquire) && !clock_gettime(of.clock, &t))
        return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
#endif
    (void)of;
    return -1;
}

void release(team *of) {
    if (of->references.fetch_sub(1, std::memory_order_acq_rel) == 1) free(of);
}

void leave(team &of) {
    if (of.inside.fetch_sub(1, std::memory_order_seq_cst) == (OVER | 1)) wake(of.inside);
}

// Whether a helper may touch what belongs to the caller: not once the call is over.
bool enter(team &of) {
    if (!(of.inside.fetch_add(1, std::memory_order_acq_rel) & OVER)) return true;
    leave(of);
    return false;
}

void serve(helper *self) {
#if defined(BN_POSIX) && !defined(__APPLE__)
    if (!pthread_getcpuclockid(pthread_self(), &self->clock)) self->has_clock.store(true, std::memory_order_release);
#endif
    for (;;) {
        team *of;
        for (int64_t since = 0; !(of = self->work.load(std::memory_order_acquire));) {
            for (int i = 0; i < 32 && !self->work.load(std::memory_order_relaxed); i++) pool_pause();
            int64_t time = now();
            if (!since) since = time;
            if (time - since < IDLE_SPIN) continue;
            uint32_t signal = self->signal.load(std::memory_order_seq_cst);
            self->asleep.store(1, std::memory_order_seq_cst);
            if (!self->work.load(std::memory_order_seq_cst)) sleep_while(self->signal, signal);
            self->asleep.store(0, std::memory_order_relaxed);
        }
        if (enter(*of)) {
            member m = {of, self->id, of->threads, 1};
            of->body(of->context, m);
            if (m.of) leave(*of); // else pool_wait has left
        }
        release(of);
        self->home->busy.fetch_sub(1, std::memory_order_relaxed);
        self->work.store(nullptr, std::memory_order_relaxed);
        self->claimed.store(false, std::memory_order_release);
    }
}

bool start(helper *made) {
#if defined(BN_POSIX)
    sigset_t every, before;
    sigfillset(&every); // signals are for the threads of the program
    pthread_sigmask(SIG_SETMASK, &every, &before);
    pthread_t thread;
    auto begin = [](void *self) -> void * {
        serve((helper *)self);
        return nullptr;
    };
    bool made_it = !pthread_create(&thread, nullptr, begin, made);
    if (made_it) pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return made_it;
#else
    std::thread(serve, made).detach();
    return true;
#endif
}

#if defined(BN_POSIX)
// A child has none of its parent's helpers: it begins anew, and leaves what they held to them.
int registered = pthread_atfork(nullptr, nullptr, [] { all = new pool; });
#endif

// Have helpers up to a number, as far as the system gives threads.
void grow(pool *home, int wanted) {
    std::lock_guard<std::mutex> held(home->growing);
    int count;
    while ((count = home->count.load(std::memory_order_relaxed)) < wanted && count < MOST_HELPERS) {
        helper *made = new (std::nothrow) helper;
        if (!made) return;
        made->home = home;
        if (!start(made)) {
            delete made;
            return;
        }
        home->helpers[count] = made;
        home->count.store(count + 1, std::memory_order_release);
    }
}

// Give a call the helpers that are free and not away. All calls together have no more members than one asks for: that
// is what the caller thinks the machine has.
void assign(team *of, pool *home, int64_t time) {
    int wanted = of->threads - 1;
    if (home->count.load(std::memory_order_acquire) < wanted) grow(home, wanted);
    int count = home->count.load(std::memory_order_acquire), given = 0;
    for (int i = 0; i < count && given < wanted; i++) {
        helper *h = home->helpers[i];
        if (h->away.load(std::memory_order_relaxed) > time || h->claimed.load(std::memory_order_relaxed)) continue;
        if (h->claimed.exchange(true, std::memory_order_acquire)) continue;
        if (home->busy.fetch_add(1, std::memory_order_relaxed) >= of->threads) {
            home->busy.fetch_sub(1, std::memory_order_relaxed);
            h->claimed.store(false, std::memory_order_release);
            return;
        }
        h->id = ++given;
        of->seats[given].by = h;
        of->references.fetch_add(1, std::memory_order_relaxed);
        h->work.store(of, std::memory_order_seq_cst);
        h->signal.fetch_add(1, std::memory_order_seq_cst);
        if (h->asleep.load(std::memory_order_seq_cst)) wake(h->signal);
    }
}

} // namespace

void pool_run(int threads, void (*body)(void *, member &), void *context) {
    if (threads <= 1) {
        member m = {nullptr, 0, 1, 1};
        body(context, m);
        return;
    }
    void *memory = nullptr;
    size_t bytes = sizeof(team) + sizeof(seat) * threads;
    if (!(memory = aligned_alloc(64, (bytes + 63) / 64 * 64))) { // alone it needs none
        pool_run(1, body, context);
        return;
    }
    memset(memory, 0, bytes);
    team *of = new (memory) team;
    of->phase = 1;
    of->references = 1;
    of->threads = threads;
    of->context = context;
    of->body = body;
    of->seats = (seat *)(of + 1);
    pool *home = all;
    int64_t began = now();
    home->busy.fetch_add(1, std::memory_order_relaxed);
    assign(of, home, began);
    member m = {of, 0, threads, 1};
    body(context, m);
    uint32_t left = of->inside.fetch_or(OVER, std::memory_order_seq_cst) | OVER;
    for (int spins = 0; left != OVER; spins++) { // who has no piece may still be on the way to its end
        if (spins < 256) pool_pause();
        else sleep_while(of->inside, left);
        left = of->inside.load(std::memory_order_acquire);
    }
    home->busy.fetch_sub(1, std::memory_order_relaxed);
    int64_t over = 0;
    for (int i = 1; i < threads; i++) {
        int64_t lost = of->seats[i].lost;
        if (lost < LOSS) continue;
        if (!over) over = now();
        if (lost <= (over - began) / 10) continue;
        helper &late = *of->seats[i].by;
        // Now and then is chance, and costs little; who loses a good part of the time since it came back stays away for
        // longer each time.
        int64_t times = lost * 5 > over - late.away ? late.times * 4 : 1;
        times = times < PENALTY ? times : PENALTY;
        int64_t spent = lost * times < LONGEST ? lost * times : LONGEST;
        late.times = times;
        late.away = over + spent;
    }
    release(of);
}

bool pool_wait(member &self) {
    team &of = *self.of;
    int64_t before[64], began = now(), slept = 0;
    int watched = self.id ? 0 : self.threads < 64 ? self.threads : 64;
    if (self.id) leave(of);
    while (of.phase.load(std::memory_order_acquire) == self.phase) {
        if (now() - began < SPIN) {
            for (int i = 0; i < 8; i++) pool_pause(); // a microsecond or less
            continue;
        }
        if (!slept) {
            slept = now();
            for (int i = 1; i < watched; i++) { // who has pieces in hand?
                seat &other = of.seats[i];
                bool holds = other.began.load(std::memory_order_relaxed) == self.phase &&
                             other.handed_in.load(std::memory_order_relaxed) != self.phase;
                before[i] = holds ? run_time(*other.by) : -1;
            }
        }
        of.sleeping.fetch_add(1, std::memory_order_seq_cst);
        sleep_while(of.phase, self.phase);
        of.sleeping.fetch_sub(1, std::memory_order_relaxed);
    }
    if (slept)
        for (int i = 1; i < watched; i++)
            if (before[i] >= 0) {
                int64_t ran = run_time(*of.seats[i].by) - before[i], lost = now() - slept - ran;
                if (lost > 0) of.seats[i].lost += lost;
            }
    if (!self.id || enter(of)) return true;
    self.of = nullptr;
    return false;
}

void pool_wake(team &of) { wake(of.phase); }

} // namespace bn
