# What the kernels use from the C headers: 16 lanes, exp and log, the tile of a matrix product, Philox.

from libc.math cimport sqrt, sqrtf      # exact by IEEE 754, the only ones taken from libm
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "lanes.h" nogil:
    enum: ABREAST
    const float INFINITY
    const float NAN
    ctypedef struct V:
        pass
    V vload_n(const float *p, int64_t n) noexcept
    void vstore_n(float *p, V a, int64_t n) noexcept
    void vstream_n(float *p, V a, int64_t n) noexcept
    void vstream_end() noexcept
    V vadd_int(V a, V b) noexcept
    V vweighted(V a, V weight) noexcept
    V vodd(int64_t i) noexcept              # integers 2i+1, 2i+3, ...
    uint32_t vsum_int(V a) noexcept
    void vprefetch(const float *p) noexcept
    V vset(float x) noexcept
    V vzero() noexcept
    V vfma(V a, V b, V c) noexcept          # a*b + c
    V vfnma(V a, V b, V c) noexcept         # c - a*b
    V vadd(V a, V b) noexcept
    V vsub(V a, V b) noexcept
    V vmul(V a, V b) noexcept
    V vdiv(V a, V b) noexcept
    V vsqrt(V a) noexcept
    V vmax(V a, V b) noexcept
    V vmin(V a, V b) noexcept               # b where either is NaN
    V vselect(uint32_t bits, V a, V b) noexcept
    V vfirst(int64_t n, V a, V b) noexcept  # a's first n lanes, then b's
    V vselect_gt(V x, V y, V a, V b) noexcept
    V vswap_pairs(V a) noexcept
    bint vany(V a) noexcept                 # whether a lane is not 0; NaN is not
    uint32_t lane_bits(int64_t n) noexcept
    float vsum(V a) noexcept
    float vmaximum(V a) noexcept

cdef extern from "elementary.h" nogil:
    const float EXP_LOW
    const float EXP_HIGH
    void vexp_within(V *y, const V *x, int n) noexcept
    void vexp_of_negative(V *y, const V *x, int n) noexcept
    V vexp(V x) noexcept
    V vlog(V x) noexcept

cdef extern from "tile.h" nogil:
    enum: TILE_ROWS
    enum: PANEL
    enum: DEPTH
    enum: BLOCK_TILES
    enum: BLOCK_COLUMNS
    int64_t TILE_FLOATS(int64_t depth) noexcept
    void tile(int rows, int64_t depth, const float *a, int64_t row, int64_t step, const float *panel, int64_t width,
              float *c, int64_t ldc, int accumulate, const float *bias, int64_t n) noexcept
    void pack_rows(float *panel, int64_t width, const float *b, int64_t ldb, int64_t depth, int64_t n) noexcept
    void pack_columns(float *panel, int64_t width, const float *b, int64_t ldb, int64_t depth, int64_t n) noexcept
    void pack_left(float *out, const float *a, int64_t row, int64_t step, int64_t M, int64_t readable, int64_t depth) noexcept
    void prefetch_rows(const float *c, int64_t ldc) noexcept
    void take_rows(float *p, int64_t ldp, int64_t n) noexcept

cdef extern from "philox.h" nogil:
    void philox4x32(uint32_t *out, uint64_t index, uint32_t site, uint32_t step, uint32_t seed, uint32_t purpose) noexcept
