// exp and log of 16 lanes: our own, because libm differs between its versions and the step may depend on nothing
// but IEEE arithmetic. Polynomials from Cephes (S. Moshier, expf.c and logf.c), evaluated with fused multiply-adds.
#ifndef MINITRAIN_ELEMENTARY_H
#define MINITRAIN_ELEMENTARY_H
#include "lanes.h"

// e^x; at most 1.1 ulp. Below -87 the result is 0, above 88.72283 Inf; NaN gives NaN.
INLINE V vexp(V x) {
  const V magic = vset(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  V c = vmax(vset(-87.0f), vmin(vset(88.7228317f), x));
  V t = vfma(c, vset(1.44269504f), magic), n = vsub(t, magic);
  V r = vfma(n, vset(-0.693359375f), c);
  r = vfma(n, vset(2.12194440e-4f), r);
  V p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vadd(vfma(vmul(r, r), p, r), vset(1.0f));
  V y = vadd_int(p, VSHIFT_LEFT(t, 23));  // p * 2^n
  y = vselect_gt(x, vset(88.7228317f), vset(INFINITY), y);
  y = vselect_gt(vset(-87.0f), x, vzero(), y);
  return vselect_nan(x, x, y);
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
