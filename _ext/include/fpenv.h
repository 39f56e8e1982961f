// The floating-point environment of the step: round to nearest, denormals kept, no traps. Any imported library may
// have set flush-to-zero; Adam's second moment decays into denormals, so that would change bits.
#ifndef MINITRAIN_FPENV_H
#define MINITRAIN_FPENV_H
#include <stdint.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
static inline uint64_t fpenv_enter(void) { uint64_t old = _mm_getcsr(); _mm_setcsr(0x1F80); return old; }
static inline void fpenv_set(uint64_t value) { _mm_setcsr((unsigned)value); }
#elif defined(__aarch64__)
static inline void fpenv_set(uint64_t value) { __asm__ volatile("msr fpcr, %0" ::"r"(value)); }
static inline uint64_t fpenv_enter(void) { uint64_t old; __asm__ volatile("mrs %0, fpcr" : "=r"(old)); fpenv_set(0); return old; }
#else
static inline uint64_t fpenv_enter(void) { return 0; }
static inline void fpenv_set(uint64_t value) { (void)value; }
#endif
#endif
