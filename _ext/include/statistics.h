// Statistics of a tensor in one pass over memory: what a probe keeps of a site. One thread, fixed lanes, a fixed order:
// the same bits on every processor and for any number of threads. NaN and Inf are counted and left out of everything
// else, which is NaN where no element is left.
//
// Of floats the fast pass adds up to 64 in each of 16 float lanes, element j in lane j % 16, before the lanes go into
// doubles: sums are right to 64 * 2^-24 = 4e-6 of the sum of the absolute values. It gives up where that is not enough
// (something is not finite, squares leave the range of a float, the mean is far from 0 for the spread); then, and for
// doubles, the exact pass turns blocks of 1024 elements into doubles that stay in the first cache while they are counted,
// summed and held against their own mean. Its blocks are merged in order (Chan, Golub & LeVeque 1979), so that a large
// mean costs the variance no digits; its sums are 8 running ones, folded by lanes 4, 2 and 1 apart.
#ifndef MINITRAIN_STATISTICS_H
#define MINITRAIN_STATISTICS_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "lanes.h"
#include "tally.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define STATISTICS_BLOCK 1024
#define STATISTICS_LANES 8

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
static void statistics_exact(const void *x, int wide, int64_t n, Statistics *s) {
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

typedef float Eight __attribute__((vector_size(32)));
typedef double EightWide __attribute__((vector_size(64)));

// sums[i] += lanes i and i + 8
INLINE void widen(EightWide *sums, V lanes) {
#if defined(MINITRAIN_AVX512) || defined(MINITRAIN_AVX2)
  Eight low = (Eight)vhalf_low(lanes), high = (Eight)vhalf_high(lanes);
#else
  Eight low, high;
  memcpy(&low, lanes.f, sizeof low);
  memcpy(&high, lanes.f + 8, sizeof high);
#endif
  *sums += __builtin_convertvector(low, EightWide) + __builtin_convertvector(high, EightWide);
}

INLINE double fold_wide(const EightWide *sums) {
  double s[STATISTICS_LANES];
  memcpy(s, sums, sizeof s);
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// 0 if the exact pass is needed.
static inline int statistics_fast(const float *x, int64_t n, Statistics *s) {
  EightWide plain = {0}, absolute = {0}, square = {0};
  V least = vset(INFINITY), most = vset(-INFINITY), zeros = vzero();
  float low[LANES], high[LANES], f[LANES];
  uint32_t count[LANES];
  int64_t i = 0;
  while (i < n) {
    int64_t end = n - i < STATISTICS_BLOCK ? n : i + STATISTICS_BLOCK;
    V a = vzero(), b = vzero(), c = vzero();
    for (; i + LANES <= end; i += LANES) {
      V v = vload(x + i);
      a = vadd(a, v);
      b = vadd(b, vand_int(v, 0x7FFFFFFFu));
      c = vfma(v, v, c);
      least = vmin(v, least);
      most = vmax(v, most);
      zeros = vcount_zeros(zeros, v);
    }
    if (i < end) {  // the lanes beyond the end are 0 in sums, and the first element elsewhere
      uint32_t bits = lane_bits(end - i);
      V v = vload_n(x + i, end - i);
      a = vadd(a, v);
      b = vadd(b, vand_int(v, 0x7FFFFFFFu));
      c = vfma(v, v, c);
      v = vselect(bits, v, vset(x[i]));
      least = vmin(v, least);
      most = vmax(v, most);
      zeros = vcount_zeros(zeros, vselect(bits, v, vset(1.0f)));
      i = end;
    }
    widen(&plain, a);
    widen(&absolute, b);
    widen(&square, c);
  }
  double sum = fold_wide(&plain), sizes = fold_wide(&absolute), squares = fold_wide(&square);
  if (!(sizes < INFINITY) || !(squares < INFINITY)) return 0;  // something is not finite, or sums overflow
  double mean = sum / n, variance = squares / n - mean * mean;
  if (squares < n * 1e-30 && sizes > 0) return 0;               // squares below 1e-38 are rounded away
  if (mean * mean > 16 * variance && sizes > 0) return 0;       // the difference has lost its digits
  *s = (Statistics){.count = n, .mean = mean, .mean_abs = sizes / n, .variance = variance, .l2 = sqrt(squares)};
  vstore(low, least);
  vstore(high, most);
  vstore(f, zeros);
  memcpy(count, f, sizeof f);
  s->min = low[0], s->max = high[0];
  for (int l = 0; l < LANES; l++) {
    if (low[l] < s->min) s->min = low[l];
    if (high[l] > s->max) s->max = high[l];
    s->zeros += count[l];
  }
  return 1;
}

static void statistics(const void *x, int wide, int64_t n, Statistics *s) {
  if (wide || !n || !statistics_fast((const float *)x, n, s)) statistics_exact(x, wide, n, s);
}

// All that was measured of both, as if it had been one tensor.
static void statistics_merge(Statistics *total, const Statistics *s) {
  if (total->count < 0) { *total = *s; return; }
  double before = total->count - total->nan - total->inf, here = s->count - s->nan - s->inf, all = before + here;
  if (here > 0 && before > 0) {
    double apart = s->mean - total->mean;
    total->variance = (total->variance * before + s->variance * here + apart * apart * (before * here / all)) / all;
    total->mean += apart * (here / all);
    total->mean_abs += (s->mean_abs - total->mean_abs) * (here / all);
    total->min = s->min < total->min ? s->min : total->min;
    total->max = s->max > total->max ? s->max : total->max;
    total->l2 = sqrt(total->l2 * total->l2 + s->l2 * s->l2);
  } else if (here > 0) {
    total->mean = s->mean, total->mean_abs = s->mean_abs, total->variance = s->variance;
    total->min = s->min, total->max = s->max, total->l2 = s->l2;
  }
  total->count += s->count;
  total->zeros += s->zeros;
  total->nan += s->nan;
  total->inf += s->inf;
}
#endif
