# Cross entropy through log-softmax, token mean.


# log_softmax = x - max - ln(sum(exp(x - max))); softmax = exp(x - max) / sum; loss = -log_softmax[target]
# A token outside the mask has loss 0, whatever its logits are.
cdef void cross_entropy_forward(float *losses, float *softmax, float *log_softmax, const float *logits,
                                const int32_t *targets, const uint8_t *loss_mask, int64_t rows, int64_t vocab,
                                float *scratch) noexcept nogil:
    cdef int64_t i, j
    cdef int w
    cdef float *top = scratch                            # scratch: 2 * rows floats
    cdef float *total = scratch + rows
    cdef const float *x = logits
    cdef float *p = softmax
    cdef V[ABREAST] e
    cdef V m, s, inverse, shift
    for i in range(rows):
        m = vset(-INFINITY)
        for j in range(0, vocab, 16):
            m = vmax(vfirst(vocab - j, vload_n(x + j, vocab - j), vset(-INFINITY)), m)
        top[i] = vmaximum(m)
        m = vset(top[i])
        s = vzero()
        j = 0
        while j < vocab:                                 # ABREAST vectors at once
            for w in range(ABREAST):
                e[w] = vsub(vload_n(x + j + 16 * w, vocab - j - 16 * w), m)
            vexp_of_negative(e, e, ABREAST)
            for w in range(ABREAST):
                vstore_n(p + j + 16 * w, e[w], vocab - j - 16 * w)
                s = vadd(s, vfirst(vocab - j - 16 * w, e[w], vzero()))
            j += 16 * ABREAST
        total[i] = vsum(s)
        x += vocab
        p += vocab
    for i in range(rows):
        inverse = vset(<float>1.0 / total[i])
        for j in range(0, vocab, 16):
            vstore_n(softmax + i * vocab + j, vmul(vload_n(softmax + i * vocab + j, vocab - j), inverse), vocab - j)
    for i in range(0, rows, 16):                         # sums to their logarithms, 16 rows at a time
        vstore_n(total + i, vlog(vload_n(total + i, rows - i)), rows - i)
    for i in range(rows):
        m = vset(top[i])
        shift = vset(total[i])
        for j in range(0, vocab, 16):
            vstore_n(log_softmax + i * vocab + j, vsub(vsub(vload_n(logits + i * vocab + j, vocab - j), m), shift), vocab - j)
        losses[i] = -log_softmax[i * vocab + targets[i]] if loss_mask[i] else <float>0.0


# mean = sum(losses) / count, both summed in order in double; result = [mean, sum, count]
cdef void mean_loss(double *result, const float *losses, const uint8_t *loss_mask, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef double total = 0, count = 0
    for i in range(n):
        if loss_mask[i]:
            total += <double>losses[i]
            count += 1
    result[0] = total / count
    result[1] = total
    result[2] = count


# dlogits = (softmax - onehot(target)) / count; 0 outside the mask
cdef void cross_entropy_backward(float *dlogits, const float *softmax, const int32_t *targets, const uint8_t *loss_mask,
                                 const double *result, int64_t rows, int64_t vocab) noexcept nogil:
    cdef int64_t i, j
    cdef float share = <float>(1.0 / result[2])
    cdef V w
    for i in range(rows):
        w = vset(share)
        for j in range(0, vocab, 16):
            vstore_n(dlogits + i * vocab + j,
                     vmul(vload_n(softmax + i * vocab + j, vocab - j), w) if loss_mask[i] else vzero(), vocab - j)
        if loss_mask[i]:
            dlogits[i * vocab + targets[i]] -= share
