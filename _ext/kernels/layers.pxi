# Embedding, layer norm, GELU, residual sum, rotary position embedding, dropout.


# x = E[token]
cdef void embedding_forward(float *x, const int32_t *tokens, const float *weight, int64_t rows, int64_t C) noexcept nogil:
    cdef int64_t i, j
    cdef const float *e
    for i in range(rows):
        e = weight + <int64_t>tokens[i] * C
        for j in range(0, C, 16):
            vstore_n(x + i * C + j, vload_n(e + j, C - j), C - j)


# dE[token] += dx, row after row; of the tokens lo..hi-1
cdef void embedding_backward(float *dweight, const int32_t *tokens, const float *dx, int64_t rows, int64_t C,
                             int64_t lo, int64_t hi, bint accumulate) noexcept nogil:
    cdef int64_t i, j
    cdef float *e
    if not accumulate:
        for i in range(lo, hi):
            for j in range(0, C, 16):
                vstore_n(dweight + i * C + j, vzero(), C - j)
    for i in range(rows):
        if lo <= tokens[i] < hi:
            e = dweight + <int64_t>tokens[i] * C
            for j in range(0, C, 16):
                vstore_n(e + j, vadd(vload_n(e + j, C - j), vload_n(dx + i * C + j, C - j)), C - j)


# y = (x - mean) * rstd * gamma + beta, rstd = 1 / sqrt(variance + eps), population variance in two passes
cdef void layernorm_forward(float *y, float *mean, float *rstd, const float *x, const float *gamma, const float *beta,
                            float eps, int64_t rows, int64_t C) noexcept nogil:
    cdef int64_t i, j
    cdef float m, r
    cdef V s, d, vm, vr
    for i in range(rows):
        s = vzero()
        for j in range(0, C, 16):
            s = vadd(s, vload_n(x + j, C - j))
        m = vsum(s) / <float>C
        vm = vset(m)
        s = vzero()
        for j in range(0, C, 16):
            d = vfirst(C - j, vsub(vload_n(x + j, C - j), vm), vzero())
            s = vfma(d, d, s)
        r = <float>1.0 / sqrtf(vsum(s) / <float>C + eps)
        if r == 0:                                       # the variance overflowed: 0 would hide it behind beta
            r = NAN
        vr = vset(r)
        for j in range(0, C, 16):
            d = vmul(vsub(vload_n(x + j, C - j), vm), vr)
            vstore_n(y + j, vfma(d, vload_n(gamma + j, C - j), vload_n(beta + j, C - j)), C - j)
        mean[i] = m
        rstd[i] = r
        x += C
        y += C


# t = dy * gamma; dx = dresidual + rstd * (t - mean(t) - xhat * mean(t * xhat)), xhat = (x - mean) * rstd
# dgamma = sum of dy * xhat, dbeta = sum of dy: here of one sequence
cdef void layernorm_backward(float *dx, float *dgamma, float *dbeta, const float *dy, const float *dresidual,
                             const float *x, const float *mean, const float *rstd, const float *gamma,
                             int64_t rows, int64_t C) noexcept nogil:
    cdef int64_t i, j, left
    cdef V a, b, d, h, t, r, vm, vr, mean_t, mean_th
    for j in range(0, C, 16):
        vstore_n(dgamma + j, vzero(), C - j)
        vstore_n(dbeta + j, vzero(), C - j)
    for i in range(rows):
        a = vzero()
        b = vzero()
        vm = vset(mean[i])
        vr = vset(rstd[i])
        for j in range(0, C, 16):
            left = C - j
            d = vload_n(dy + j, left)
            h = vmul(vsub(vload_n(x + j, left), vm), vr)
            t = vmul(d, vload_n(gamma + j, left))       # 0 past the edge: dy and gamma load as 0 there
            a = vadd(a, t)
            b = vfirst(left, vfma(t, h, b), b)
            vstore_n(dgamma + j, vfma(d, h, vload_n(dgamma + j, left)), left)
            vstore_n(dbeta + j, vadd(d, vload_n(dbeta + j, left)), left)
        mean_t = vset(vsum(a) / <float>C)
        mean_th = vset(vsum(b) / <float>C)
        for j in range(0, C, 16):
            left = C - j
            h = vmul(vsub(vload_n(x + j, left), vm), vr)
            t = vmul(vload_n(dy + j, left), vload_n(gamma + j, left))
            r = vmul(vr, vfnma(h, mean_th, vsub(t, mean_t)))
            if dresidual != NULL:
                r = vadd(vload_n(dresidual + j, left), r)
            vstore_n(dx + j, r, left)
        x += C
        dy += C
        dx += C
        if dresidual != NULL:
            dresidual += C


# y = x * s, s = sigmoid(2z), z = sqrt(2/pi) * (x + 0.044715 x^3): the tanh form, for 1 + tanh(z) = 2 sigmoid(2z)
# slope = dy/dx = s + s * (1 - s) * x * 2 dz/dx, kept for the backward pass; s * (1 - s) is 0 long before x^2 reaches the
# limit that keeps dz finite
cdef void gelu_forward(float *y, float *slope, const float *x, int64_t n) noexcept nogil:
    cdef int64_t i = 0, j
    cdef int w
    cdef V[ABREAST] u, z, e, dz
    cdef V s, q
    cdef V one = vset(1.0), limit = vset(1e30), low = vset(EXP_LOW), high = vset(EXP_HIGH)
    cdef V k0 = vset(1.5957691216057308)                 # 2 sqrt(2/pi)
    cdef V k1 = vset(0.044715)
    cdef V k3 = vset(0.134145)                           # 3 * 0.044715
    while i < n:
        for w in range(ABREAST):
            j = i + 16 * w
            u[w] = vload_n(x + j, n - j)
            q = vmin(limit, vmul(u[w], u[w]))            # NaN stays: vmin returns its second argument then
            z[w] = vsub(vzero(), vmul(k0, vmul(u[w], vfma(k1, q, one))))
            dz[w] = vmul(k0, vfma(k3, q, one))
            e[w] = vmax(low, vmin(high, z[w]))
        vexp_within(e, e, ABREAST)                       # below EXP_LOW it adds nothing to 1; NaN is in u
        for w in range(ABREAST):
            j = i + 16 * w
            s = vdiv(one, vadd(one, vselect_gt(z[w], high, vset(INFINITY), e[w])))
            vstore_n(y + j, vmul(u[w], s), n - j)
            vstore_n(slope + j, vfma(vmul(vmul(s, vsub(one, s)), u[w]), dz[w], s), n - j)
        i += 16 * ABREAST


# dx = dy * slope
cdef void gelu_backward(float *dx, const float *dy, const float *slope, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(0, n, 16):
        vstore_n(dx + i, vmul(vload_n(dy + i, n - i), vload_n(slope + i, n - i)), n - i)


# y = x + branch
cdef void residual_forward(float *y, const float *x, const float *branch, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(0, n, 16):
        vstore_n(y + i, vadd(vload_n(x + i, n - i), vload_n(branch + i, n - i)), n - i)


# neighbouring pairs (2i, 2i+1) of x[T, C] turned in place by the angle of (position, i): RoFormer, eq. 34
# y = x * cos + swap(x) * sin, where sin carries the sign of its lane; direction -1 turns back (the backward pass)
cdef void rope(float *x, const float *cosine, const float *sine, int64_t T, int64_t C, float direction) noexcept nogil:
    cdef int64_t i
    cdef V u
    cdef V sign = vset(direction)
    for i in range(0, T * C, 16):
        u = vload_n(x + i, T * C - i)
        vstore_n(x + i, vfma(vswap_pairs(u), vmul(sign, vload_n(sine + i, T * C - i)),
                             vmul(u, vload_n(cosine + i, T * C - i))), T * C - i)


# y = x * (1 / (1 - rate) where kept, else 0); element first+i is kept if its Philox word >= rate * 2^32
# A product, so that NaN passes even where it is dropped. The backward pass is the same call on dy.
cdef void dropout(float *y, const float *x, const uint32_t *key, uint32_t site, double rate, int64_t first, int64_t n) noexcept nogil:
    cdef int64_t i, word = 0
    cdef uint32_t words[4]
    cdef uint64_t limit = <uint64_t>(rate * 4294967296.0)
    cdef float scale = <float>(1.0 / (1.0 - rate))
    for i in range(first, first + n):
        word = i % 4
        if word == 0 or i == first:
            philox4x32(words, <uint64_t>(i // 4), site, key[2], key[0], key[1])
        y[i] = x[i] * (scale if words[word] >= limit else <float>0.0)
