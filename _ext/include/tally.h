// What a probe keeps of a tensor, and the functions of an instruction set that fill it in (statistics.h).
#ifndef MINITRAIN_TALLY_H
#define MINITRAIN_TALLY_H
#include <stdint.h>

typedef struct {
  int64_t count;  // of all elements; -1 before the first measurement
  int64_t zeros, nan, inf;
  double mean, mean_abs, variance, min, max, l2;
} Statistics;

typedef void (*Measure)(const void *x, int wide, int64_t n, Statistics *s);
typedef void (*Merge)(Statistics *total, const Statistics *s);
#endif
