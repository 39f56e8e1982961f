# Cross entropy through log-softmax, token mean.


# log_softmax = x - max - ln(sum(exp(x - max))); softmax = exp(x - max) / sum; loss = -log_softmax[target]
# A token outside the mask has loss 0, whatever its logits are.
cdef void cross_entropy_forward(float *losses, float *softmax, float *log_softmax, const float *logits,
                                const int32_t *targets, const uint8_t *loss_mask, int64_t rows, int64_t vocab,
                                float *scratch) noexcept nogil:
    cdef int64_t i = 0, j, r
    cdef int w
    cdef float *top = scratch                            # scratch: 2 * rows floats
    cdef float *total = scratch + rows
    cdef V[ABREAST] m, s, e
    cdef V inverse, largest, shift
    while i < rows:                                      # ABREAST at once, beyond the last the last again
        for w in range(ABREAST):
            m[w] = vset(-INFINITY)
            s[w] = vzero()
        for j in range(0, vocab, 16):
            for w in range(ABREAST):
                r = min(i + w, rows - 1)
                m[w] = vmax(vfirst(vocab - j, vload_n(logits + r * vocab + j, vocab - j), vset(-INFINITY)), m[w])
        for w in range(ABREAST):
            top[min(i + w, rows - 1)] = vmaximum(m[w])
            m[w] = vset(top[min(i + w, rows - 1)])
        for j in range(0, vocab, 16):
            for w in range(ABREAST):
                e[w] = vsub(vload_n(logits + min(i + w, rows - 1) * vocab + j, vocab - j), m[w])
            vexp_of_negative(e, e, ABREAST)
            for w in range(ABREAST):
                vstore_n(softmax + min(i + w, rows - 1) * vocab + j, e[w], vocab - j)
                s[w] = vadd(s[w], vfirst(vocab - j, e[w], vzero()))
        for w in range(ABREAST):
            total[min(i + w, rows - 1)] = vsum(s[w])
        i += ABREAST
    for i in range(rows):
        inverse = vset(<float>1.0 / total[i])
        for j in range(0, vocab, 16):
            vstore_n(softmax + i * vocab + j, vmul(vload_n(softmax + i * vocab + j, vocab - j), inverse), vocab - j)
    for i in range(0, rows, 16):                         # sums to their logarithms, 16 rows at a time
        vstore_n(total + i, vlog(vload_n(total + i, rows - i)), rows - i)
    for i in range(rows):
        largest = vset(top[i])
        shift = vset(total[i])
        for j in range(0, vocab, 16):
            vstore_n(log_softmax + i * vocab + j, vsub(vsub(vload_n(logits + i * vocab + j, vocab - j), largest), shift), vocab - j)
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
