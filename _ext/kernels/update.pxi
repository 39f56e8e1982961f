# Global norm, clipping and AdamW, over the flat buffers.


# sums[b] = sum of squares of block b (4096 elements), blocks lo..hi-1
cdef void square_sums(double *sums, const float *g, int64_t P, int64_t lo, int64_t hi) noexcept nogil:
    cdef int64_t b, i, end
    cdef V s, x
    for b in range(lo, hi):
        s = vzero()
        end = min(P, (b + 1) * 4096)
        for i in range(b * 4096, end, 16):
            x = vload_n(g + i, end - i)
            s = vfma(x, x, s)
        sums[b] = vsum(s)


# norm = sqrt(sum of the blocks' sums, in order, in double)
cdef void norm(double *result, const double *sums, int64_t n) noexcept nogil:
    cdef int64_t b
    cdef double total = 0
    for b in range(n):
        total += sums[b]
    result[0] = sqrt(total)


# g *= factor
cdef void scale(float *g, const double *factor, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef V f = vset(<float>factor[0])
    for i in range(0, n, 16):
        vstore_n(g + i, vmul(vload_n(g + i, n - i), f), n - i)


# g = min(max(g, -limit), limit); NaN stays NaN, and a NaN limit makes everything NaN
cdef void clamp(float *g, const double *limit, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef V top = vset(<float>limit[0]), bottom = vset(-<float>limit[0]), x
    cdef V one = vset(<float>limit[0] if limit[0] != limit[0] else <float>1.0)
    for i in range(0, n, 16):
        x = vload_n(g + i, n - i)
        x = vselect_gt(x, top, top, x)                   # a comparison with NaN is false, so x itself is kept
        vstore_n(g + i, vmul(vselect_gt(bottom, x, bottom, x), one), n - i)


# m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
# theta = theta - lr * ((m / c1) / (sqrt(v / c2) + eps) + decay * theta),  c1 = 1 - beta1^t, c2 = 1 - beta2^t, t from 1
# (Loshchilov & Hutter, "Decoupled weight decay regularization", algorithm 2)
# hyper = [lr, beta1, beta2, eps, decay, t]; segment s is offsets[s]..offsets[s+1]-1 and decays if decays[s].
cdef struct Hyper:
    V lr, beta1, rest1, beta2, rest2, eps, unbias1, unbias2
    float decay


cdef inline Hyper in_lanes(const double *hyper) noexcept nogil:
    cdef Hyper h
    cdef int64_t t = <int64_t>hyper[5]
    h.lr, h.eps, h.decay = vset(<float>hyper[0]), vset(<float>hyper[3]), <float>hyper[4]
    h.beta1, h.rest1 = vset(<float>hyper[1]), vset(<float>(1.0 - hyper[1]))
    h.beta2, h.rest2 = vset(<float>hyper[2]), vset(<float>(1.0 - hyper[2]))
    h.unbias1 = vset(<float>(1.0 / (1.0 - power(hyper[1], t))))
    h.unbias2 = vset(<float>(1.0 / (1.0 - power(hyper[2], t))))
    return h


cdef struct State:
    float *theta
    float *m
    float *v


# Elements lo..hi-1. Unless copy.theta is NULL, a copy of all three is left as well (`vstream_end` behind the last), and in
# sums the `checksum` of what was written in each, and whether a number of it is not finite. Made here, that costs half of
# what it costs afterwards.
cdef inline void adamw(State at, State copy, uint32_t *sums, const float *g, const int64_t *offsets, const uint8_t *decays,
                       const Hyper *h, int64_t lo, int64_t hi) noexcept nogil:
    cdef int64_t i = lo, s = 0, end
    cdef V lr = h.lr, beta1 = h.beta1, rest1 = h.rest1, beta2 = h.beta2, rest2 = h.rest2, eps = h.eps
    cdef V unbias1 = h.unbias1, unbias2 = h.unbias2, decay, x, new_m, new_v, old, weight
    cdef V sum0 = vzero(), sum1 = vzero(), sum2 = vzero(), zeros = vzero()
    while i < hi:
        while offsets[s + 1] <= i:
            s += 1
        end = min(hi, offsets[s + 1])
        decay = vset(h.decay if decays[s] else <float>0.0)
        while i < end:
            vprefetch(g + i + 512)
            vprefetch(at.m + i + 512)
            vprefetch(at.v + i + 512)
            vprefetch(at.theta + i + 512)
            x = vload_n(g + i, end - i)
            new_m = vfma(vload_n(at.m + i, end - i), beta1, vmul(x, rest1))
            new_v = vfma(vload_n(at.v + i, end - i), beta2, vmul(vmul(x, x), rest2))
            old = vload_n(at.theta + i, end - i)
            vstore_n(at.m + i, new_m, end - i)
            vstore_n(at.v + i, new_v, end - i)
            old = moved(old, new_m, new_v, lr, unbias1, unbias2, eps, decay)
            vstore_n(at.theta + i, old, end - i)
            if copy.theta != NULL:
                vstream_n(copy.theta + i, old, end - i)
                vstream_n(copy.m + i, new_m, end - i)
                vstream_n(copy.v + i, new_v, end - i)
                if end - i < 16:                         # the lanes past the end are not in the sums
                    old, new_m, new_v = vload_n(at.theta + i, end - i), vload_n(at.m + i, end - i), vload_n(at.v + i, end - i)
                weight = vodd(i)
                sum0 = vadd_int(sum0, vweighted(old, weight))
                sum1 = vadd_int(sum1, vweighted(new_m, weight))
                sum2 = vadd_int(sum2, vweighted(new_v, weight))
                zeros = vfma(vadd(vadd(old, new_m), new_v), vzero(), zeros)  # NaN where one of them is NaN or Inf
            i += 16
        i = end
    if copy.theta != NULL:
        sums[0], sums[1], sums[2] = vsum_int(sum0), vsum_int(sum1), vsum_int(sum2)
        sums[3] = vsum(zeros) != 0


# sum of (b ^ b >> 15) * (2i + 1) mod 2^32, b = bits(x_i): what is added up tells all bits, and odd weights show any one change
# for certain, most others as well
cdef inline uint32_t checksum(const float *x, int64_t lo, int64_t hi) noexcept nogil:
    cdef int64_t i
    cdef V s = vzero()
    for i in range(lo, hi, 16):
        vprefetch(x + i + 512)
        s = vadd_int(s, vweighted(vload_n(x + i, hi - i), vodd(i)))
    return vsum_int(s)


cdef inline bint unchanged(State at, const uint32_t *sums, int64_t lo, int64_t hi) noexcept nogil:
    """Whether elements lo..hi-1 have these checksums."""
    return (checksum(at.theta, lo, hi) == sums[0] and checksum(at.m, lo, hi) == sums[1]
            and checksum(at.v, lo, hi) == sums[2])


# theta - lr * ((m * unbias1) / (sqrt(v * unbias2) + eps) + decay * theta)
cdef inline V moved(V theta, V m, V v, V lr, V unbias1, V unbias2, V eps, V decay) noexcept nogil:
    cdef V step = vdiv(vmul(m, unbias1), vadd(vsqrt(vmul(v, unbias2)), eps))
    return vfnma(lr, vfma(decay, theta, step), theta)


# The last line of adamw alone, for moments that are known: with those of a record, the parameters follow from a
# keyframe without any gradient, to the same bits.
cdef void adamw_theta(float *theta, const float *m, const float *v, const int64_t *offsets, const uint8_t *decays,
                      const double *hyper, int64_t S, int64_t lo, int64_t hi) noexcept nogil:
    cdef int64_t s, i, start, end
    cdef Hyper h = in_lanes(hyper)
    cdef V decay, old
    for s in range(S):
        start = max(lo, offsets[s])
        end = min(hi, offsets[s + 1])
        decay = vset(h.decay if decays[s] else <float>0.0)
        for i in range(start, end, 16):
            old = vload_n(theta + i, end - i)
            old = moved(old, vload_n(m + i, end - i), vload_n(v + i, end - i), h.lr, h.unbias1, h.unbias2, h.eps, decay)
            vstore_n(theta + i, old, end - i)


cdef double power(double base, int64_t n) noexcept nogil:
    """base^n by squaring."""
    cdef double result = 1
    while n > 0:
        if n & 1:
            result *= base
        base *= base
        n >>= 1
    return result
