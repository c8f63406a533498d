// Threads that go through the same phases together and meet after each.

#pragma once
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The pieces of a phase that are taken, and those that are done. The upper half of each is the
// number of the call.
typedef struct {
    _Atomic uint64_t taken, done;
} Phase;

// Waiting threads sleep until `rung` changes; asleep: their number.
typedef struct {
    atomic_int rung, asleep;
} Bell;

enum { SPINS = 2000 };

static void sleep_while(atomic_int *place, int value) {
#if defined(__linux__)
    syscall(SYS_futex, place, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
    if (atomic_load(place) == value) sched_yield();
#endif
}

static void wake_all(atomic_int *place) {
#if defined(__linux__)
    syscall(SYS_futex, place, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
    (void)place;
#endif
}

static void begin(Phase *phase, uint32_t call) {
    atomic_store(&phase->done, (uint64_t)call << 32);
    atomic_store(&phase->taken, (uint64_t)call << 32);
}

// Takes `step` of `count` pieces, from *from on. Returns 0 if none is left, or the call is over.
static int take(Phase *phase, uint32_t call, int count, int step, int *from) {
    uint64_t seen = atomic_load(&phase->taken);
    do {
        if (seen >> 32 != call || (uint32_t)seen >= (uint32_t)count) return 0;
    } while (!atomic_compare_exchange_weak(&phase->taken, &seen, seen + step));
    *from = (int)(uint32_t)seen;
    return 1;
}

// Notes that n more of `count` pieces are done. Returns whether all are.
static int complete(Phase *phase, int n, int count) {
    return (uint32_t)atomic_fetch_add(&phase->done, n) + n == (uint32_t)count;
}

static void ring(Bell *bell) {
    atomic_fetch_add(&bell->rung, 1);
    if (atomic_load(&bell->asleep)) wake_all(&bell->rung);
}

static int is_over(Phase *phase, uint32_t call, int count) {
    const uint64_t seen = atomic_load(&phase->done);
    return seen >> 32 != call || (uint32_t)seen >= (uint32_t)count;
}

// Waits until `count` are done or the call is over: spins for some microseconds, then sleeps. On a
// busy machine, the thread with the last piece may be suspended, and gets the processor of one that
// sleeps.
static void await(Phase *phase, uint32_t call, int count, Bell *bell) {
    for (int i = 0; i < SPINS; i++) {
        if (is_over(phase, call, count)) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    atomic_fetch_add(&bell->asleep, 1);
    for (;;) {
        const int rung = atomic_load(&bell->rung);
        if (is_over(phase, call, count)) break;
        sleep_while(&bell->rung, rung);
    }
    atomic_fetch_sub(&bell->asleep, 1);
}
