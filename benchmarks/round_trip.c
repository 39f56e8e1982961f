// How long a cache line takes from one core to another and back: two threads turn a number up in turn.
// cc -O3 -pthread round_trip.c -o round_trip && ./round_trip 0 1    prints the fastest and the median of many bursts on
// these two cores, in nanoseconds.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { BURSTS = 200, LENGTH = 1000 };
static _Alignas(128) atomic_long ball;  // even: it is the first thread's turn

static void keep_to(int core)
{
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    if (pthread_setaffinity_np(pthread_self(), sizeof cores, &cores)) {
        fprintf(stderr, "expected a core that this process may use, got %d\n", core);
        exit(2);
    }
}

static void play(long first, double *seconds)
{
    for (int i = 0; i < BURSTS; i++) {
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        for (long n = (long)i * LENGTH; n < (i + 1L) * LENGTH; n++) {
            while (atomic_load_explicit(&ball, memory_order_acquire) != 2 * n + first)
                ;
            atomic_store_explicit(&ball, 2 * n + first + 1, memory_order_release);
        }
        clock_gettime(CLOCK_MONOTONIC, &b);
        seconds[i] = (b.tv_sec - a.tv_sec) + (b.tv_nsec - a.tv_nsec) * 1e-9;
    }
}

static void *other(void *core)
{
    double unread[BURSTS];
    keep_to(*(int *)core);
    play(1, unread);
    return NULL;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **words)
{
    if (count != 3) {
        fprintf(stderr, "expected the numbers of two cores, got %d words\n", count - 1);
        return 2;
    }
    double seconds[BURSTS];
    int here = atoi(words[1]), there = atoi(words[2]);
    pthread_t thread;
    keep_to(here);
    if (pthread_create(&thread, NULL, other, &there))
        return 1;
    play(0, seconds);
    pthread_join(thread, NULL);
    qsort(seconds, BURSTS, sizeof seconds[0], ascending);
    printf("%.1f %.1f\n", seconds[0] / LENGTH * 1e9, seconds[BURSTS / 2] / LENGTH * 1e9);
    return 0;
}
