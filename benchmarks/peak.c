// The most fused multiply-adds that one core does: 12 independent chains of vectors of LANES floats, in registers.
// cc -O3 -march=native -ffp-contract=fast -DLANES=16 peak.c -o peak && ./peak    prints the fastest and the median
// burst in GFLOP/s. 16 lanes are an AVX-512 register, 8 AVX2, 4 NEON.
#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__)
#define REGISTER "v"
#else
#define REGISTER "w"
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
enum { CHAINS = 12, BURSTS = 300, LENGTH = 20000 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static Vector all(float x)
{
    return x - (Vector){0};
}

static double burst(void)
{
    Vector sum[CHAINS], a = all(1.0001f), b = all(0.9999f);
    for (int i = 0; i < CHAINS; i++)
        sum[i] = all((float)i);
    double start = now();
    for (long n = 0; n < LENGTH; n++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sum[i] = a * b + sum[i];
        // The compiler must neither merge the rounds nor take the product out of the loop.
        __asm__ volatile("" : "+" REGISTER (a), "+" REGISTER (b));
    }
    double seconds = now() - start;
    volatile float sink = 0;
    for (int i = 0; i < CHAINS; i++)
        sink = sink + sum[i][0];
    return 2.0 * LANES * CHAINS * LENGTH / seconds * 1e-9;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(void)
{
    double rate[BURSTS];
    for (int i = 0; i < BURSTS; i++)
        rate[i] = burst();
    qsort(rate, BURSTS, sizeof rate[0], ascending);
    printf("%.2f %.2f\n", rate[BURSTS - 1], rate[BURSTS / 2]);
    return 0;
}
