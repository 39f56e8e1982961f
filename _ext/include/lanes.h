// A vector of 16 floats with the same lane layout on every instruction set.
//
// Design: the bits of every kernel are defined in terms of these lanes, never in terms of a register width.
// A sum over a row is 16 running sums (element j goes to lane j % 16) folded by one fixed tree, whether the lanes
// live in one AVX-512 register, two AVX2 registers or an array. Fused multiply-add is explicit; the compiler may
// not fuse or reorder anything (-ffp-contract=off, no -ffast-math).
//
// Tails: vload_n and vstore_n touch only the first n lanes (n <= 0: none, n >= 16: all); the other lanes load as 0.
// Masks are 16 bits, lane 0 lowest.
#ifndef MINITRAIN_LANES_H
#define MINITRAIN_LANES_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "op.h"  // refuses flags that change results

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define ABREAST 4  // vectors or rows that a kernel of long chains takes at once, so that none waits for its own last step
#define EACH(n) _Pragma("GCC unroll 4") for (int i = 0; i < n; i++)
INLINE uint32_t lane_bits(int64_t n) { return n >= LANES ? 0xFFFFu : n <= 0 ? 0u : (1u << n) - 1u; }

#if defined(MINITRAIN_AVX512)  // ------------------------------------------------------------ one 512-bit register
#include <immintrin.h>
typedef __m512 V;
INLINE V vload(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore(float *p, V a) { _mm512_storeu_ps(p, a); }
INLINE void vstream(float *p, V a) { _mm512_stream_ps(p, a); }
INLINE void vstream_end(void) { _mm_sfence(); }
INLINE V vset(float x) { return _mm512_set1_ps(x); }
INLINE V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a*b + c
INLINE V vfnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
INLINE V vadd(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V vsqrt(V a) { return _mm512_sqrt_ps(a); }
INLINE V vmax(V a, V b) { return _mm512_max_ps(a, b); }  // a > b ? a : b, so b where either is NaN
INLINE V vmin(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V vselect(uint32_t bits, V a, V b) { return _mm512_mask_blend_ps((__mmask16)bits, b, a); }
INLINE V vselect_gt(V x, V y, V a, V b) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), b, a); }
INLINE V vselect_nan(V x, V a, V b) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), b, a); }
INLINE V vswap_pairs(V a) { return _mm512_permute_ps(a, 0xB1); }  // lanes 1 0 3 2 5 4 ...
INLINE V vload_bits(uint32_t bits, const float *p) { return _mm512_maskz_loadu_ps((__mmask16)bits, p); }
INLINE void vstore_first(float *p, V a, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)lane_bits(n), a); }
INLINE V vadd_int(V a, V b) { return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); }
INLINE V vsub_int(V a, V b) { return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); }
INLINE V vand_int(V a, uint32_t b) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32((int)b))); }
INLINE V vor_int(V a, uint32_t b) { return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_set1_epi32((int)b))); }
INLINE V vxor(V a, V b) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_castps_si512(b))); }
INLINE V vmul_int(V a, V b) { return _mm512_castsi512_ps(_mm512_mullo_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); }
INLINE V vset_int(uint32_t a) { return _mm512_castsi512_ps(_mm512_set1_epi32((int)a)); }
#define VSHIFT_LEFT(a, n) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), n))
#define VSHIFT_RIGHT(a, n) _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(a), n))
INLINE V vcount_zeros(V count, V a) {  // lanes of integers: one more where a is 0.0 or -0.0
  __m512i n = _mm512_castps_si512(count);
  return _mm512_castsi512_ps(_mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_EQ_OQ), n, _mm512_set1_epi32(1)));
}
INLINE int vany(V a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0; }  // a lane that is not 0.0 or -0.0
INLINE V vint_to_float(V a) { return _mm512_cvtepi32_ps(_mm512_castps_si512(a)); }
INLINE __m256 vhalf_low(V a) { return _mm512_castps512_ps256(a); }
INLINE __m256 vhalf_high(V a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }

#elif defined(MINITRAIN_AVX2)  // ------------------------------------------------------------ two 256-bit registers
#include <immintrin.h>
typedef struct { __m256 lo, hi; } V;
#define BOTH(e_lo, e_hi) ((V){(e_lo), (e_hi)})
#define EACH_HALF(f, a, b) BOTH(f((a).lo, (b).lo), f((a).hi, (b).hi))
INLINE __m256i as_int(__m256 a) { return _mm256_castps_si256(a); }
INLINE __m256 as_float(__m256i a) { return _mm256_castsi256_ps(a); }
INLINE V vload(const float *p) { return BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void vstore(float *p, V a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
INLINE void vstream(float *p, V a) { _mm256_stream_ps(p, a.lo); _mm256_stream_ps(p + 8, a.hi); }
INLINE void vstream_end(void) { _mm_sfence(); }
INLINE V vset(float x) { __m256 t = _mm256_set1_ps(x); return BOTH(t, t); }
INLINE V vfma(V a, V b, V c) { return BOTH(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)); }
INLINE V vfnma(V a, V b, V c) { return BOTH(_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)); }
INLINE V vadd(V a, V b) { return EACH_HALF(_mm256_add_ps, a, b); }
INLINE V vsub(V a, V b) { return EACH_HALF(_mm256_sub_ps, a, b); }
INLINE V vmul(V a, V b) { return EACH_HALF(_mm256_mul_ps, a, b); }
INLINE V vdiv(V a, V b) { return EACH_HALF(_mm256_div_ps, a, b); }
INLINE V vsqrt(V a) { return BOTH(_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)); }
INLINE V vmax(V a, V b) { return EACH_HALF(_mm256_max_ps, a, b); }
INLINE V vmin(V a, V b) { return EACH_HALF(_mm256_min_ps, a, b); }
INLINE __m256i spread8(uint32_t bits) {  // bit i -> lane i all ones
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each);
}
INLINE V vselect(uint32_t bits, V a, V b) {
  return BOTH(_mm256_blendv_ps(b.lo, a.lo, as_float(spread8(bits))), _mm256_blendv_ps(b.hi, a.hi, as_float(spread8(bits >> 8))));
}
INLINE V vselect_gt(V x, V y, V a, V b) {
  return BOTH(_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_GT_OQ)), _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_GT_OQ)));
}
INLINE V vselect_nan(V x, V a, V b) {
  return BOTH(_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, x.lo, _CMP_UNORD_Q)), _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, x.hi, _CMP_UNORD_Q)));
}
INLINE V vswap_pairs(V a) { return BOTH(_mm256_permute_ps(a.lo, 0xB1), _mm256_permute_ps(a.hi, 0xB1)); }
INLINE V vload_bits(uint32_t bits, const float *p) {
  return BOTH(_mm256_maskload_ps(p, spread8(bits)), _mm256_maskload_ps(p + 8, spread8(bits >> 8)));
}
INLINE void vstore_first(float *p, V a, int64_t n) {  // n < 16; by parts, because AMD's masked store is slow
  __m256 x = a.lo;
  if (n <= 0) return;
  if (n & 8) { _mm256_storeu_ps(p, x); p += 8; x = a.hi; }
  __m128 y = _mm256_castps256_ps128(x);
  if (n & 4) { _mm_storeu_ps(p, y); p += 4; y = _mm256_extractf128_ps(x, 1); }
  if (n & 2) { _mm_storel_pi((__m64 *)p, y); p += 2; y = _mm_movehl_ps(y, y); }
  if (n & 1) _mm_store_ss(p, y);
}
INLINE V vadd_int(V a, V b) { return BOTH(as_float(_mm256_add_epi32(as_int(a.lo), as_int(b.lo))), as_float(_mm256_add_epi32(as_int(a.hi), as_int(b.hi)))); }
INLINE V vsub_int(V a, V b) { return BOTH(as_float(_mm256_sub_epi32(as_int(a.lo), as_int(b.lo))), as_float(_mm256_sub_epi32(as_int(a.hi), as_int(b.hi)))); }
INLINE V vand_int(V a, uint32_t b) { __m256 t = as_float(_mm256_set1_epi32((int)b)); return BOTH(_mm256_and_ps(a.lo, t), _mm256_and_ps(a.hi, t)); }
INLINE V vor_int(V a, uint32_t b) { __m256 t = as_float(_mm256_set1_epi32((int)b)); return BOTH(_mm256_or_ps(a.lo, t), _mm256_or_ps(a.hi, t)); }
INLINE V vxor(V a, V b) { return EACH_HALF(_mm256_xor_ps, a, b); }
INLINE V vmul_int(V a, V b) { return BOTH(as_float(_mm256_mullo_epi32(as_int(a.lo), as_int(b.lo))), as_float(_mm256_mullo_epi32(as_int(a.hi), as_int(b.hi)))); }
INLINE V vset_int(uint32_t a) { __m256 t = as_float(_mm256_set1_epi32((int)a)); return BOTH(t, t); }
#define VSHIFT_LEFT(a, n) BOTH(as_float(_mm256_slli_epi32(as_int((a).lo), n)), as_float(_mm256_slli_epi32(as_int((a).hi), n)))
#define VSHIFT_RIGHT(a, n) BOTH(as_float(_mm256_srli_epi32(as_int((a).lo), n)), as_float(_mm256_srli_epi32(as_int((a).hi), n)))
INLINE __m256 count_zeros8(__m256 count, __m256 a) {
  return as_float(_mm256_sub_epi32(as_int(count), as_int(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_EQ_OQ))));
}
INLINE V vcount_zeros(V count, V a) { return EACH_HALF(count_zeros8, count, a); }
INLINE int vany(V a) {
  const __m256 zero = _mm256_setzero_ps();
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, zero, _CMP_NEQ_UQ), _mm256_cmp_ps(a.hi, zero, _CMP_NEQ_UQ))) != 0;
}
INLINE V vint_to_float(V a) { return BOTH(_mm256_cvtepi32_ps(as_int(a.lo)), _mm256_cvtepi32_ps(as_int(a.hi))); }
INLINE __m256 vhalf_low(V a) { return a.lo; }
INLINE __m256 vhalf_high(V a) { return a.hi; }

#else  // ------------------------------------------------------------------------ portable C: any CPU, exact fmaf
typedef struct { float f[LANES]; } V;
#define EACH_LANE(e) V r; for (int i = 0; i < LANES; i++) r.f[i] = (e); return r
#define EACH_BITS(e) V r; for (int i = 0; i < LANES; i++) r.f[i] = bits_float(e); return r
INLINE uint32_t float_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float bits_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE V vload(const float *p) { V r; memcpy(&r, p, sizeof r); return r; }
INLINE void vstore(float *p, V a) { memcpy(p, &a, sizeof a); }
INLINE void vstream(float *p, V a) { vstore(p, a); }
INLINE void vstream_end(void) {}
INLINE V vset(float x) { EACH_LANE(x); }
INLINE V vfma(V a, V b, V c) { EACH_LANE(fmaf(a.f[i], b.f[i], c.f[i])); }
INLINE V vfnma(V a, V b, V c) { EACH_LANE(fmaf(-a.f[i], b.f[i], c.f[i])); }
INLINE V vadd(V a, V b) { EACH_LANE(a.f[i] + b.f[i]); }
INLINE V vsub(V a, V b) { EACH_LANE(a.f[i] - b.f[i]); }
INLINE V vmul(V a, V b) { EACH_LANE(a.f[i] * b.f[i]); }
INLINE V vdiv(V a, V b) { EACH_LANE(a.f[i] / b.f[i]); }
INLINE V vsqrt(V a) { EACH_LANE(sqrtf(a.f[i])); }
INLINE V vmax(V a, V b) { EACH_LANE(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
INLINE V vmin(V a, V b) { EACH_LANE(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
INLINE V vselect(uint32_t bits, V a, V b) { EACH_LANE(bits >> i & 1 ? a.f[i] : b.f[i]); }
INLINE V vselect_gt(V x, V y, V a, V b) { EACH_LANE(x.f[i] > y.f[i] ? a.f[i] : b.f[i]); }
INLINE V vselect_nan(V x, V a, V b) { EACH_LANE(x.f[i] != x.f[i] ? a.f[i] : b.f[i]); }
INLINE V vswap_pairs(V a) { EACH_LANE(a.f[i ^ 1]); }
INLINE V vload_bits(uint32_t bits, const float *p) { EACH_LANE(bits >> i & 1 ? p[i] : 0.0f); }
INLINE void vstore_first(float *p, V a, int64_t n) { for (int i = 0; i < n; i++) p[i] = a.f[i]; }
INLINE V vadd_int(V a, V b) { EACH_BITS(float_bits(a.f[i]) + float_bits(b.f[i])); }
INLINE V vsub_int(V a, V b) { EACH_BITS(float_bits(a.f[i]) - float_bits(b.f[i])); }
INLINE V vxor(V a, V b) { EACH_BITS(float_bits(a.f[i]) ^ float_bits(b.f[i])); }
INLINE V vmul_int(V a, V b) { EACH_BITS(float_bits(a.f[i]) * float_bits(b.f[i])); }
INLINE V vset_int(uint32_t b) { V a = vset(0.0f); EACH_BITS((float_bits(a.f[i]), b)); }
INLINE V vand_int(V a, uint32_t b) { EACH_BITS(float_bits(a.f[i]) & b); }
INLINE V vor_int(V a, uint32_t b) { EACH_BITS(float_bits(a.f[i]) | b); }
INLINE V vshift_left(V a, int n) { EACH_BITS(float_bits(a.f[i]) << n); }
INLINE V vshift_right(V a, int n) { EACH_BITS(float_bits(a.f[i]) >> n); }
#define VSHIFT_LEFT(a, n) vshift_left(a, n)
#define VSHIFT_RIGHT(a, n) vshift_right(a, n)
INLINE V vcount_zeros(V count, V a) { EACH_BITS(float_bits(count.f[i]) + (a.f[i] == 0)); }
INLINE int vany(V a) {
  for (int i = 0; i < LANES; i++) if (a.f[i] != 0) return 1;
  return 0;
}
INLINE V vint_to_float(V a) { EACH_LANE((float)(int32_t)float_bits(a.f[i])); }
#endif

INLINE V vzero(void) { return vset(0.0f); }
INLINE V vload_n(const float *p, int64_t n) { return n >= LANES ? vload(p) : vload_bits(lane_bits(n), p); }
INLINE V vfirst(int64_t n, V a, V b) { return n >= LANES ? a : vselect(lane_bits(n), a, b); }  // a's first n lanes, then b's
INLINE void vstore_n(float *p, V a, int64_t n) { if (n >= LANES) vstore(p, a); else vstore_first(p, a, n); }
// Past the caches where that can be done: for what nobody here reads again. `vstream_end` behind the last.
INLINE void vstream_n(float *p, V a, int64_t n) {
  if (n >= LANES && (uintptr_t)p % 64 == 0) vstream(p, a); else vstore_n(p, a, n);
}

INLINE V vodd(int64_t i) {  // integers 2i+1, 2i+3, ...
  static const uint32_t twice[LANES] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return vadd_int(vset_int((uint32_t)(2 * i + 1)), vload((const float *)twice));
}
// What a checksum adds up: the bits of a by an odd weight. The high ones are folded into the lower ones first, since the
// product leaves little of them: two signs that flip would cancel.
INLINE V vweighted(V a, V weight) { return vmul_int(vxor(a, VSHIFT_RIGHT(a, 15)), weight); }
INLINE uint32_t vsum_int(V a) {
  uint32_t x[LANES], sum = 0;
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}
INLINE void vprefetch(const float *p) { __builtin_prefetch(p); }

// The fixed tree: lanes i and i+8, then i and i+4, i+2, i+1.
#if defined(MINITRAIN_AVX512) || defined(MINITRAIN_AVX2)
#define FOLD(name, op)                                                                             \
  INLINE float name(V a) {                                                                         \
    __m256 s = _mm256_##op##_ps(vhalf_low(a), vhalf_high(a));                                      \
    __m128 q = _mm_##op##_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));              \
    q = _mm_##op##_ps(q, _mm_movehl_ps(q, q));                                                     \
    return _mm_cvtss_f32(_mm_##op##_ss(q, _mm_movehdup_ps(q)));                                    \
  }
FOLD(vsum, add)
FOLD(vmaximum, max)
#else
INLINE float vsum(V a) {
  for (int w = 8; w; w /= 2) for (int i = 0; i < w; i++) a.f[i] = a.f[i] + a.f[i + w];
  return a.f[0];
}
INLINE float vmaximum(V a) {
  for (int w = 8; w; w /= 2) for (int i = 0; i < w; i++) a.f[i] = a.f[i] > a.f[i + w] ? a.f[i] : a.f[i + w];
  return a.f[0];
}
#endif
#endif
