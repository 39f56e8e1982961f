// Philox4x32-10 (Salmon et al., SC 2011), the same words as minitrain.rng.
#ifndef MINITRAIN_PHILOX_H
#define MINITRAIN_PHILOX_H
#include <stdint.h>
static inline void philox4x32(uint32_t out[4], uint64_t index, uint32_t site, uint32_t step, uint32_t seed, uint32_t purpose) {
  uint32_t a = (uint32_t)index, b = (uint32_t)(index >> 32), c = site, d = step;
  for (int round = 0; round < 10; round++) {
    uint64_t p = (uint64_t)0xD2511F53u * a, q = (uint64_t)0xCD9E8D57u * c;
    a = (uint32_t)(q >> 32) ^ b ^ seed;
    b = (uint32_t)q;
    c = (uint32_t)(p >> 32) ^ d ^ purpose;
    d = (uint32_t)p;
    seed += 0x9E3779B9u;
    purpose += 0xBB67AE85u;
  }
  out[0] = a; out[1] = b; out[2] = c; out[3] = d;
}
#endif
