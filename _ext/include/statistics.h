// Statistics of a tensor in one pass over memory: what a probe keeps of a site.
//
// A block of 1024 elements is turned into doubles that stay in the first cache while they are counted, summed and held
// against their own mean; blocks are merged in order (Chan, Golub & LeVeque 1979), so that a large mean costs the
// variance no digits. Sums are 8 running ones, element j of a block in lane j % 8, folded by lanes 4, 2 and 1 apart:
// plain arithmetic compiled once and run by one thread, the same bits on every processor and for any number of threads.
// NaN and Inf are counted and left out of everything else, which is NaN where no element is left.
#ifndef MINITRAIN_STATISTICS_H
#define MINITRAIN_STATISTICS_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "op.h"  // refuses flags that change results
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define STATISTICS_BLOCK 1024
#define STATISTICS_LANES 8

typedef struct {
  int64_t count;  // of all elements; -1 before the first measurement
  int64_t zeros, nan, inf;
  double mean, mean_abs, variance, min, max, l2;
} Statistics;

typedef double Pair __attribute__((vector_size(16)));
typedef int64_t PairBits __attribute__((vector_size(16)));

#if defined(__SSE2__)
static inline Pair pair_min(Pair a, Pair b) { return (Pair)_mm_min_pd((__m128d)a, (__m128d)b); }  // a < b ? a : b
static inline Pair pair_max(Pair a, Pair b) { return (Pair)_mm_max_pd((__m128d)a, (__m128d)b); }
#else
static inline Pair pair_choose(PairBits yes, Pair a, Pair b) { return (Pair)(((PairBits)a & yes) | ((PairBits)b & ~yes)); }
static inline Pair pair_min(Pair a, Pair b) { return pair_choose(a < b, a, b); }
static inline Pair pair_max(Pair a, Pair b) { return pair_choose(a > b, a, b); }
#endif
static inline Pair pair_abs(Pair a) { return (Pair)((PairBits)a & (PairBits){INT64_MAX, INT64_MAX}); }

static inline double fold_pairs(const Pair *s) {
  Pair t = (s[0] + s[2]) + (s[1] + s[3]);
  return t[0] + t[1];
}

typedef union {
  double element[STATISTICS_BLOCK];
  Pair pair[STATISTICS_BLOCK / 2];
} Block;

// The functions below take whole lanes: what is missing to a multiple of 8 is filled so that it does not count.
static inline void block_fill(Block *y, int64_t n, double value) {
  for (; n % STATISTICS_LANES; n++) y->element[n] = value;
}

static inline void block_extremes(Block *y, int64_t n, Statistics *s) {
  block_fill(y, n, y->element[0]);
  Pair low[2] = {y->pair[0], y->pair[1]}, high[2] = {low[0], low[1]};
  PairBits zeros = {0, 0};
  for (int64_t i = 0; 2 * i < n; i += 2)
    for (int k = 0; k < 2; k++) {
      Pair v = y->pair[i + k];
      low[k] = pair_min(v, low[k]);
      high[k] = pair_max(v, high[k]);
      zeros -= v == (Pair){0, 0};
    }
  low[0] = pair_min(low[0], low[1]);
  high[0] = pair_max(high[0], high[1]);
  for (int l = 0; l < 2; l++) {
    if (low[0][l] < s->min) s->min = low[0][l];
    if (high[0][l] > s->max) s->max = high[0][l];
  }
  s->zeros += zeros[0] + zeros[1] - (y->element[0] == 0) * (-n & 3);  // this loop goes by four
}

// sums = [sum of x, sum of |x|, sum of x^2]
static inline void block_sums(Block *y, int64_t n, double *sums) {
  block_fill(y, n, 0);
  Pair plain[4] = {0}, absolute[4] = {0}, square[4] = {0};
  for (int64_t i = 0; 2 * i < n; i += 4)
    for (int k = 0; k < 4; k++) {
      Pair v = y->pair[i + k];
      plain[k] += v;
      absolute[k] += pair_abs(v);
      square[k] += v * v;
    }
  sums[0] = fold_pairs(plain);
  sums[1] = fold_pairs(absolute);
  sums[2] = fold_pairs(square);
}

// sum of (x - mean)^2
static inline double block_deviations(Block *y, int64_t n, double mean) {
  block_fill(y, n, mean);
  Pair square[4] = {0};
  for (int64_t i = 0; 2 * i < n; i += 4)
    for (int k = 0; k < 4; k++) {
      Pair d = y->pair[i + k] - (Pair){mean, mean};
      square[k] += d * d;
    }
  return fold_pairs(square);
}

// Count NaN and Inf and close up the finite elements; how many they are.
static inline int64_t block_finite(Block *y, int64_t n, Statistics *s) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    double v = y->element[i];
    if (v - v == 0) y->element[kept++] = v;  // Inf - Inf is NaN
    else if (v == v) s->inf++;
    else s->nan++;
  }
  return kept;
}

// n elements, float or (wide) double
static void statistics(const void *x, int wide, int64_t n, Statistics *s) {
  int64_t before = 0;
  double sums[3], total = 0, absolute = 0, squares = 0, spread = 0;
  Block y;
  *s = (Statistics){.count = n, .min = INFINITY, .max = -INFINITY};
  for (int64_t start = 0; start < n; start += STATISTICS_BLOCK) {
    int64_t size = n - start < STATISTICS_BLOCK ? n - start : STATISTICS_BLOCK;
    if (wide) memcpy(y.element, (const double *)x + start, 8 * size);
    else for (int64_t i = 0; i < size; i++) y.element[i] = ((const float *)x)[start + i];
    block_sums(&y, size, sums);
    if (!(sums[1] < INFINITY)) {  // something is not finite
      size = block_finite(&y, size, s);
      if (!size) continue;
      block_sums(&y, size, sums);
    }
    block_extremes(&y, size, s);
    double mean = sums[0] / size;
    spread += block_deviations(&y, size, mean);
    if (before) {
      double apart = mean - total / before;
      spread += apart * apart * ((double)before * size / (before + size));
    }
    before += size;
    total += sums[0];
    absolute += sums[1];
    squares += sums[2];
  }
  if (!before) s->min = s->max = NAN;
  s->mean = before ? total / before : NAN;
  s->mean_abs = before ? absolute / before : NAN;
  s->variance = before ? spread / before : NAN;
  s->l2 = before ? sqrt(squares) : NAN;
}
#endif
