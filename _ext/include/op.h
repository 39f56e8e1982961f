// One operation of a program: a kernel and its arguments, in the order of the kernel's signature.
#ifndef MINITRAIN_OP_H
#define MINITRAIN_OP_H
#include <stdint.h>
#if defined(__FAST_MATH__) || __FLT_EVAL_METHOD__ != 0
#error "these compiler flags change results: no -ffast-math, no x87 arithmetic"
#endif
#define OP_ARRAYS 12
#define OP_SIZES 6
#define OP_NUMBERS 4
#define SPLIT_SEQUENCE 1  // signatures.SPLITS
struct Op;
typedef void (*Kernel)(const struct Op *, int64_t lo, int64_t hi, float *scratch);
typedef struct Op {
  Kernel kernel;
  void *array[OP_ARRAYS];      // outputs, then inputs; a missing optional array is NULL
  int64_t size[OP_SIZES];      // the dimensions, in the order in which the signature first names them
  double number[OP_NUMBERS];   // scalar arguments
  int64_t units;               // what threads share out: sequences, strips, blocks
  int64_t before, layer, each; // strips: elements of the layer before the parameter's, in all, and of a strip; layer 0: none
  int32_t split;               // which of those; a change of split between two operations is a barrier
  int32_t threads;             // of the pool
} Op;
#endif
