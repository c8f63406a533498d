// Threads that walk the same phases together and meet after each.

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

typedef struct {
    int threads;
    atomic_int arrived, phase, asleep;
} Barrier;

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

// All threads meet. They look for one another for some microseconds, then sleep: on a busy machine
// the one that is missing has been put aside, and gets the processor of one that sleeps.
static void meet(Barrier *barrier) {
    const int phase = atomic_load_explicit(&barrier->phase, memory_order_acquire);
    if (atomic_fetch_add(&barrier->arrived, 1) == barrier->threads - 1) {
        atomic_store(&barrier->arrived, 0);
        atomic_store(&barrier->phase, phase + 1);
        if (atomic_load(&barrier->asleep)) wake_all(&barrier->phase);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&barrier->phase, memory_order_acquire) != phase) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    atomic_fetch_add(&barrier->asleep, 1);
    while (atomic_load(&barrier->phase) == phase) sleep_while(&barrier->phase, phase);
    atomic_fetch_sub(&barrier->asleep, 1);
}
