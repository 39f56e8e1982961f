// What statistics of floats cost at the least: bare loops over an array in the first cache, nothing around them. DESIGN.md
// (41) sets it against what a probe takes.
// cc -O3 -ffp-contract=off -mavx512f statistics_bound.c -o bound && ./bound    on a processor with AVX-512.
#define _POSIX_C_SOURCE 199309L
#include <immintrin.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef __m512 V;
typedef __m512i I;
#define F(op) _mm512_##op##_ps
#define N(op) _mm512_##op##_epi32

enum { LANES = sizeof(V) / 4, SIZE = 4096, TURNS = 50, ROUNDS = 400 };
static float x[SIZE] __attribute__((aligned(64)));
static volatile float sink;

#define LOOP                                                                                                  \
    for (int i = 0; i < SIZE; i += 2 * LANES)                                                                 \
        for (int k = 0; k < 2; k++)
#define SUMS                                                                                                  \
    V v = F(loadu)(x + i + k * LANES);                                                                        \
    I size = _mm512_and_si512(_mm512_castps_si512(v), N(set1)(0x7FFFFFFF));                                   \
    plain[k] = F(add)(plain[k], v);                                                                           \
    absolute[k] = F(add)(absolute[k], _mm512_castsi512_ps(size));                                             \
    square[k] = F(fmadd)(v, v, square[k])

static void consume(V a) { sink = a[0]; }
static void both(const V *a) { consume(a[0]); consume(a[1]); }

// Of x, of |x| and of the squares.
static __attribute__((noinline)) void sums(void)
{
    V plain[2] = {{0}}, absolute[2] = {{0}}, square[2] = {{0}};
    LOOP { SUMS; }
    both(plain), both(absolute), both(square);
}

// And the largest and the smallest |x|.
static __attribute__((noinline)) void magnitudes(void)
{
    V plain[2] = {{0}}, absolute[2] = {{0}}, square[2] = {{0}};
    I least[2] = {N(set1)(0x7FFFFFFF), N(set1)(0x7FFFFFFF)}, most[2] = {N(set1)(0), N(set1)(0)};
    LOOP
    {
        SUMS;
        least[k] = N(min)(least[k], size);
        most[k] = N(max)(most[k], size);
    }
    both(plain), both(absolute), both(square);
    for (int k = 0; k < 2; k++) consume(_mm512_castsi512_ps(least[k])), consume(_mm512_castsi512_ps(most[k]));
}

// The smallest and the largest x, and the smallest |x|, which is 0 where there are zeros to count.
static __attribute__((noinline)) void extremes(void)
{
    V plain[2] = {{0}}, absolute[2] = {{0}}, square[2] = {{0}};
    V low[2] = {F(set1)(INFINITY), F(set1)(INFINITY)}, high[2] = {F(set1)(-INFINITY), F(set1)(-INFINITY)};
    I least[2] = {N(set1)(0x7FFFFFFF), N(set1)(0x7FFFFFFF)};
    LOOP
    {
        SUMS;
        low[k] = F(min)(v, low[k]);
        high[k] = F(max)(v, high[k]);
        least[k] = N(min)(least[k], size);
    }
    both(plain), both(absolute), both(square), both(low), both(high);
    for (int k = 0; k < 2; k++) consume(_mm512_castsi512_ps(least[k]));
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void told(const char *what, void (*loop)(void))
{
    double best = INFINITY;
    for (int i = 0; i < ROUNDS; i++) {
        double start = now();
        for (int j = 0; j < TURNS; j++)
            loop();
        double seconds = (now() - start) / TURNS;
        best = seconds < best ? seconds : best;
    }
    printf("%-45s %.4f ns an element\n", what, best / SIZE * 1e9);
}

int main(void)
{
    for (int i = 0; i < SIZE; i++)
        x[i] = rand() / (float)RAND_MAX - 0.5f;
    told("three sums", sums);
    told("three sums, extreme magnitudes", magnitudes);
    told("three sums, minimum, maximum, zeros in sight", extremes);
    return 0;
}
