# Causal multi-head attention of one head of one sequence. Heads are columns of (T, C) arrays, so no copy splits them.
#
# Queries go in blocks of 16. Block i0 sees the keys before its end, e = min(T, i0 + 16): scores past e are neither
# computed, read nor written (p and dp are zeros when they are made, and stay so there), and the block's own masked
# entries are exact zeros. Blocks are 16 on every instruction set, because they decide where the sums over keys end.


cdef inline int64_t block_end(int64_t i0, int64_t T) noexcept nogil:
    return min(T, i0 + 16)


cdef void product(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, Panels b, int64_t M, int64_t N,
                  int64_t k0, int64_t k1) noexcept nogil:
    """c[M, N] = a[M, k0:k1] . b[k0:k1, N]: the first N columns of b."""
    cdef int64_t j = 0, m, k, width, down, depth
    while j < N:
        width = panel_width(b.columns - j)
        down = b.down if b.down else width
        k = k0
        while k < k1:
            depth = min(<int64_t>DEPTH, k1 - k)
            m = 0
            while m < M:
                tile(<int>min(<int64_t>TILE_ROWS, M - m), depth, a + m * row + k * step, row, step,
                     b.first + j * b.across + k * down, down, c + m * ldc + j, ldc, k > k0, NULL, min(width, N - j))
                m += TILE_ROWS
            k += depth
        j += width


cdef void key_lanes(uint32_t *keys, const uint8_t *key_mask, int64_t T) noexcept nogil:
    """The mask of one sequence as lane masks: bit j % 16 of keys[j / 16]."""
    cdef int64_t j
    for j in range(0, T, 16):
        keys[j >> 4] = 0
    for j in range(T):
        keys[j >> 4] |= <uint32_t>(key_mask[j] != 0) << (j & 15)


cdef void softmax_rows(float *p, int64_t T, const uint32_t *keys, int64_t i0, int64_t end, float scale) noexcept nogil:
    """Rows i0 to end-1 of p[T, 0:end] = softmax(scale * p) over the keys up to the row itself that the mask allows; 0
    elsewhere, also if there are none.

    ABREAST rows at once; beyond the last it is the last again, which writes the same numbers.
    """
    cdef int64_t i = i0, j
    cdef int w
    cdef int64_t[ABREAST] seen
    cdef uint32_t[ABREAST] bits
    cdef float *row[ABREAST]
    cdef V[ABREAST] x, shift, total
    cdef V vscale = vset(scale)
    cdef float sum
    while i < end:
        for w in range(ABREAST):
            seen[w] = min(i + w + 1, end)
            row[w] = p + (seen[w] - 1) * T
            total[w] = vset(-INFINITY)
        for j in range(0, end, 16):
            for w in range(ABREAST):
                bits[w] = keys[j >> 4] & lane_bits(seen[w] - j)
                total[w] = vmax(vselect(bits[w], vload_n(row[w] + j, end - j), vset(-INFINITY)), total[w])
        for w in range(ABREAST):
            shift[w] = vset(vmaximum(total[w]) * scale)  # rounded like every scaled score: the largest is exp(0)
            total[w] = vzero()
        for j in range(0, end, 16):
            for w in range(ABREAST):
                bits[w] = keys[j >> 4] & lane_bits(seen[w] - j)
                x[w] = vsub(vmul(vload_n(row[w] + j, end - j), vscale), shift[w])
            vexp_of_negative(x, x, ABREAST)              # keys that are not seen may lie above
            for w in range(ABREAST):
                x[w] = vselect(bits[w], x[w], vzero())
                vstore_n(row[w] + j, x[w], end - j)
                total[w] = vadd(total[w], x[w])
        for w in range(ABREAST):
            sum = vsum(total[w])                         # 0 only where no key is seen: else the largest adds 1
            total[w] = vset(<float>1.0 / sum if sum != 0 else <float>0.0)
        for j in range(0, end, 16):
            for w in range(ABREAST):
                x[w] = vmul(vload_n(row[w] + j, end - j), total[w])
            for w in range(ABREAST):
                vstore_n(row[w] + j, x[w], end - j)
        i += ABREAST


# s = scale * q . k^T; p = softmax(s) over the keys <= the query that are real; o = p . v
cdef void attention_forward(float *o, float *p, const float *q, const float *k, const float *v, const uint32_t *keys,
                            int64_t T, int64_t C, int64_t D, float *scratch) noexcept nogil:
    cdef int64_t i0, end, rows
    cdef float scale = <float>(1.0 / sqrt(<double>D))
    cdef Panels right = packed(scratch, k, C, True, T, D)
    for i0 in range(0, T, 16):
        end = block_end(i0, T)
        rows = end - i0
        product(p + i0 * T, T, q + i0 * C, C, 1, right, rows, end, 0, D)
        softmax_rows(p, T, keys, i0, end, scale)
    right = packed(scratch, v, C, False, D, T)
    for i0 in range(0, T, 16):
        end = block_end(i0, T)
        product(o + i0 * C, C, p + i0 * T, T, 1, right, end - i0, D, 0, end)


# dv = p^T . do; dp = do . v^T; ds = scale * p * (dp - sum(dp * p)); dq = ds . k; dk = ds^T . q
cdef void attention_backward(float *dq, float *dk, float *dv, float *dp, const float *do_, const float *p,
                             const float *q, const float *k, const float *v,
                             int64_t T, int64_t C, int64_t D, float *scratch) noexcept nogil:
    cdef int64_t i0, i, j, end
    cdef float scale = <float>(1.0 / sqrt(<double>D))
    cdef float *ds = scratch
    cdef float *memory = scratch + T * T
    cdef Panels right = packed(memory, do_, C, False, D, T)
    cdef V total, shift, d, vscale = vset(scale)
    for i0 in range(0, T, 16):                           # keys i0.. are seen by the queries from i0 on
        product(dv + i0 * C, C, p + i0, 1, T, right, block_end(i0, T) - i0, D, i0, T)
    right = packed(memory, v, C, True, T, D)
    for i0 in range(0, T, 16):
        end = block_end(i0, T)
        product(dp + i0 * T, T, do_ + i0 * C, C, 1, right, end - i0, end, 0, D)
        for i in range(i0, end):
            total = vzero()
            for j in range(0, end, 16):
                d = vselect(lane_bits(i + 1 - j), vload_n(dp + i * T + j, end - j), vzero())
                vstore_n(dp + i * T + j, d, end - j)
                total = vfma(d, vload_n(p + i * T + j, end - j), total)
            shift = vset(vsum(total))
            for j in range(0, end, 16):
                d = vmul(vmul(vload_n(p + i * T + j, end - j), vscale), vsub(vload_n(dp + i * T + j, end - j), shift))
                vstore_n(ds + i * T + j, d, end - j)
    right = packed(memory, k, C, False, D, T)
    for i0 in range(0, T, 16):
        end = block_end(i0, T)
        product(dq + i0 * C, C, ds + i0 * T, T, 1, right, end - i0, D, 0, end)
    right = packed(memory, q, C, False, D, T)
    for i0 in range(0, T, 16):
        product(dk + i0 * C, C, ds + i0, 1, T, right, block_end(i0, T) - i0, D, i0, T)
