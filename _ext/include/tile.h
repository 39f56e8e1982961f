// The inner tile of every matrix product, and the packing of its right-hand side.
//
// Design: each output element is one chain of fused multiply-adds in k order over at most DEPTH values of k; longer
// sums are chains of DEPTH added in order. Vectors run across n and tiles across m and n, so neither the
// tile's size nor the instruction set touches the order: the bits are those of a plain triple loop.
// The right-hand side is read in panels of PANEL columns, k-major: packed, so that the inner loop reads memory in order,
// or where it stands. Columns past the edge are packed as 0 and never stored. The left-hand side is read where it stands
// while it is small; a large one is packed as well, a block of tiles at a time (kernels/matmul.pxi decides).
#ifndef MINITRAIN_TILE_H
#define MINITRAIN_TILE_H
#include "lanes.h"

#define DEPTH 256
#if defined(MINITRAIN_AVX512)
#define TILE_ROWS 8
#define PANEL_VECTORS 2  // 8 x 32: 16 accumulators, 2 of b, broadcasts from memory
#else
#define TILE_ROWS 6
#define PANEL_VECTORS 1  // 6 x 16: 12 of 16 registers with AVX2
#endif
#define PANEL (LANES * PANEL_VECTORS)
// A block of the left-hand side as it is packed: BLOCK_TILES tiles, each TILE_FLOATS(depth) from the next. The 16 floats
// between them take the stores that run over, and keep the tiles off the same cache sets.
#define BLOCK_TILES 16
#define BLOCK_COLUMNS 1024  // of the right-hand side that are packed for all blocks of the left
#define TILE_FLOATS(depth) ((depth) * TILE_ROWS + 16)

// c[rows, n] = a[rows, depth] . panel (+ c if accumulate) (+ bias[n]); element (i, k) of a stands at a[i*row + k*step].
// The panel's rows are `width` apart. rows and vectors are literals at every call, so the accumulators stay in registers.
INLINE void tile_body(const int rows, const int vectors, int64_t depth, const float *a, int64_t row, int64_t step,
                      const float *panel, int64_t width, float *c, int64_t ldc, int accumulate, const float *bias, int64_t n) {
  V sum[TILE_ROWS][PANEL_VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) sum[i][j] = vzero();
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    V b[PANEL_VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) b[j] = vload(panel + LANES * j);
    panel += width;
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      V x = vset(a[i * row]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) sum[i][j] = vfma(x, b[j], sum[i][j]);
    }
    a += step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
      float *p = c + i * ldc + LANES * j;
      int64_t left = n - LANES * j;
      V r = sum[i][j];
      if (accumulate) r = vadd(vload_n(p, left), r);
      if (bias) r = vadd(r, vload_n(bias + LANES * j, left));
      vstore_n(p, r, left);
    }
}

static __attribute__((noinline)) void tile(int rows, int64_t depth, const float *a, int64_t row, int64_t step,
                                           const float *panel, int64_t width, float *c, int64_t ldc, int accumulate,
                                           const float *bias, int64_t n) {
#define ARGS(row, step) depth, a, row, step, panel, width, c, ldc, accumulate, bias, n
#define CASE(m)                                                                                    \
  case m:                                                                                          \
    if (PANEL_VECTORS == 1 || n <= LANES) tile_body(m, 1, ARGS(row, step));                        \
    else if (step == 1) tile_body(m, PANEL_VECTORS, ARGS(row, 1));                                 \
    else if (row == 1) tile_body(m, PANEL_VECTORS, ARGS(1, step));                                 \
    else tile_body(m, PANEL_VECTORS, ARGS(row, step));                                             \
    break;
  switch (rows) {
#if TILE_ROWS == 8
    CASE(8) CASE(7)
#endif
    CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
  }
#undef CASE
#undef ARGS
}

// panel[k][j] = b[k*ldb + j], j < n, else 0; width is a multiple of 16
INLINE void pack_rows(float *panel, int64_t width, const float *b, int64_t ldb, int64_t depth, int64_t n) {
  for (int64_t k = 0; k < depth; k++, panel += width, b += ldb)
    for (int64_t j = 0; j < width; j += LANES) vstore(panel + j, vload_n(b + j, n - j));
}

// out[k*ldo + j] = in[j*ldi + k], k after k: with ldo < 8 each row of out takes back what the one before wrote too far
#if defined(MINITRAIN_AVX512) || defined(MINITRAIN_AVX2)
INLINE void copy8(float *out, const float *in) { _mm256_storeu_ps(out, _mm256_loadu_ps(in)); }
INLINE void transpose8x8(float *out, int64_t ldo, const float *in, int64_t ldi) {
  __m256 r[8], t[8];
  for (int q = 0; q < 8; q++) r[q] = _mm256_loadu_ps(in + q * ldi);
  for (int q = 0; q < 8; q += 2) {
    t[q] = _mm256_unpacklo_ps(r[q], r[q + 1]);
    t[q + 1] = _mm256_unpackhi_ps(r[q], r[q + 1]);
  }
  for (int q = 0; q < 8; q += 4) {
    r[q] = _mm256_shuffle_ps(t[q], t[q + 2], 0x44);
    r[q + 1] = _mm256_shuffle_ps(t[q], t[q + 2], 0xEE);
    r[q + 2] = _mm256_shuffle_ps(t[q + 1], t[q + 3], 0x44);
    r[q + 3] = _mm256_shuffle_ps(t[q + 1], t[q + 3], 0xEE);
  }
  for (int q = 0; q < 4; q++) _mm256_storeu_ps(out + q * ldo, _mm256_permute2f128_ps(r[q], r[q + 4], 0x20));
  for (int q = 0; q < 4; q++) _mm256_storeu_ps(out + (q + 4) * ldo, _mm256_permute2f128_ps(r[q], r[q + 4], 0x31));
}
#else
INLINE void copy8(float *out, const float *in) { for (int i = 0; i < 8; i++) out[i] = in[i]; }
INLINE void transpose8x8(float *out, int64_t ldo, const float *in, int64_t ldi) {
  for (int k = 0; k < 8; k++) for (int j = 0; j < 8; j++) out[k * ldo + j] = in[j * ldi + k];
}
#endif

// panel[k][j] = b[j*ldb + k], j < n, else 0
INLINE void pack_columns(float *panel, int64_t width, const float *b, int64_t ldb, int64_t depth, int64_t n) {
  for (int64_t j = 0; j < width; j += 8) {
    int64_t k = 0;
    if (j + 8 <= n) for (; k + 8 <= depth; k += 8) transpose8x8(panel + k * width + j, width, b + j * ldb + k, ldb);
    for (; k < depth; k++)
      for (int64_t i = j; i < j + 8; i++) panel[k * width + i] = i < n ? b[i * ldb + k] : 0.0f;
  }
}

// Tile t of out, at t * TILE_FLOATS(depth): out[k * TILE_ROWS + i] = a[(t * TILE_ROWS + i) * row + k * step], for M rows;
// `readable` rows may be read. Eight at a time where they may, though a tile has fewer: the surplus is overwritten.
INLINE void pack_left(float *out, const float *a, int64_t row, int64_t step, int64_t M, int64_t readable, int64_t depth) {
  int64_t wide = 0;  // rows of tiles that can be read eight rows at a time
  while (wide < M && wide + 8 <= readable) wide += TILE_ROWS;
  if (row == 1)
    for (int64_t k = 0; k < depth; k++) {
      float *o = out + k * TILE_ROWS;
      for (int64_t m = 0; m < wide; m += TILE_ROWS, o += TILE_FLOATS(depth)) copy8(o, a + k * step + m);
    }
  for (int64_t m = 0; m < M; m += TILE_ROWS, out += TILE_FLOATS(depth)) {
    int64_t k = 0, rows = M - m < TILE_ROWS ? M - m : TILE_ROWS;
    if (m < wide && row == 1) continue;
    if (m < wide && step == 1)
      for (; k + 8 <= depth; k += 8) transpose8x8(out + k * TILE_ROWS, TILE_ROWS, a + m * row + k, row);
    for (; k < depth; k++)
      for (int64_t i = 0; i < rows; i++) out[k * TILE_ROWS + i] = a[(m + i) * row + k * step];
  }
}

// the rows of c that a tile is about to write
INLINE void prefetch_rows(const float *c, int64_t ldc) {
  for (int i = 0; i < TILE_ROWS; i++) __builtin_prefetch(c + i * ldc, 1);
}

// Take the lines of TILE_ROWS rows of p from the caches of other cores, which have read them, and ask for those of the next
// tile. Only a store does that: what it stores is what stands there. (prefetchw on AMD leaves a line shared that is there.)
INLINE void take_rows(float *p, int64_t ldp, int64_t n) {
  for (int i = 0; i < TILE_ROWS; i++)
    for (int64_t j = 0; j < n; j += LANES) {
      volatile uint32_t *line = (volatile uint32_t *)(p + i * ldp + j);
      __builtin_prefetch(p + (TILE_ROWS + i) * ldp + j);
      *line = *line;
    }
}
#endif
