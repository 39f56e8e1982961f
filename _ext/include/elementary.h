// exp and log of 16 lanes: our own, because libm differs between its versions and the step may depend on nothing
// but IEEE arithmetic. Polynomials from Cephes (S. Moshier, expf.c and logf.c), evaluated with fused multiply-adds.
#ifndef MINITRAIN_ELEMENTARY_H
#define MINITRAIN_ELEMENTARY_H
#include "lanes.h"

#define EXP_LOW (-87.0f)
#define EXP_HIGH 88.7228317f

// y = e^x of n vectors, EXP_LOW <= x <= EXP_HIGH; at most 1.1 ulp. Outside that and for NaN y means nothing. The steps of
// the vectors alternate: one vector alone has the processor wait for each step before the next.
INLINE void vexp_within(V *y, const V *x, const int n) {
  const V magic = vset(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  V t[ABREAST], r[ABREAST], p[ABREAST];
  EACH(n) t[i] = vfma(x[i], vset(1.44269504f), magic);
  EACH(n) p[i] = vsub(t[i], magic);
  EACH(n) r[i] = vfma(p[i], vset(-0.693359375f), x[i]);
  EACH(n) r[i] = vfma(p[i], vset(2.12194440e-4f), r[i]);
  EACH(n) p[i] = vset(1.9875691500e-4f);
#pragma GCC unroll 5
  for (int k = 0; k < 5; k++) EACH(n) p[i] = vfma(p[i], r[i], vset(c[k]));
  EACH(n) p[i] = vadd(vfma(vmul(r[i], r[i]), p[i], r[i]), vset(1.0f));
  EACH(n) y[i] = vadd_int(p[i], VSHIFT_LEFT(t[i], 23));  // p * 2^n
}

// e^x; at most 1.1 ulp. Below -87 the result is 0, above 88.72283 Inf; NaN gives NaN.
INLINE V vexp(V x) {
  V y, within = vmax(vset(EXP_LOW), vmin(vset(EXP_HIGH), x));
  vexp_within(&y, &within, 1);
  y = vselect_gt(x, vset(EXP_HIGH), vset(INFINITY), y);
  y = vselect_gt(vset(EXP_LOW), x, vzero(), y);
  return vselect_nan(x, x, y);
}

// y = e^x of n vectors for x <= 0, 0 below -87; NaN gives NaN, and where x is larger y means nothing.
INLINE void vexp_of_negative(V *y, const V *x, const int n) {
  V c[ABREAST], e[ABREAST];
  EACH(n) c[i] = vmax(vset(EXP_LOW), x[i]);
  vexp_within(e, c, n);
  EACH(n) e[i] = vselect_gt(vset(EXP_LOW), x[i], vzero(), e[i]);
  EACH(n) y[i] = vadd(vsub(c[i], c[i]), e[i]);  // plus 0, or NaN: cheaper than a choice
}

// ln x for x = 0 or a normal number; at most 1.5 ulp. log 0 = -Inf, log of a negative number is NaN.
// Denormals are taken for 0: no caller has one (the sum of a softmax is at least 1).
INLINE V vlog(V x) {
  V e = vsub_int(VSHIFT_RIGHT(x, 23), VSHIFT_RIGHT(vset(0.5f), 23));           // exponent, for a mantissa in [0.5, 1)
  V m = vor_int(vand_int(x, 0x007FFFFFu), 0x3F000000u), one = vset(1.0f);
  V k = vint_to_float(e), half_root = vset(0.707106781f);
  k = vselect_gt(half_root, m, vsub(k, one), k);                               // mantissa to [0.707, 1.414)
  m = vsub(vselect_gt(half_root, m, vadd(m, m), m), one);
  V z = vmul(m, m), p = vset(7.0376836292e-2f);
  p = vfma(p, m, vset(-1.1514610310e-1f));
  p = vfma(p, m, vset(1.1676998740e-1f));
  p = vfma(p, m, vset(-1.2420140846e-1f));
  p = vfma(p, m, vset(1.4249322787e-1f));
  p = vfma(p, m, vset(-1.6668057665e-1f));
  p = vfma(p, m, vset(2.0000714765e-1f));
  p = vfma(p, m, vset(-2.4999993993e-1f));
  p = vfma(p, m, vset(3.3333331174e-1f));
  V y = vmul(vmul(m, z), p);
  y = vfma(k, vset(-2.12194440e-4f), y);
  y = vfma(vset(-0.5f), z, y);
  y = vadd(m, y);
  y = vfma(k, vset(0.693359375f), y);
  y = vselect_gt(vset(1.17549435e-38f), x, vset(-INFINITY), y);
  y = vselect_gt(vzero(), x, vset(NAN), y);
  y = vselect_gt(x, vset(3.40282347e38f), x, y);  // Inf
  return vselect_nan(x, x, y);
}
#endif
