# Causal multi-head attention of one head of one sequence. Heads are columns of (T, C) arrays, so no copy splits them.
#
# Queries go in blocks of 16. Block i0 sees the keys before its end, e = min(T, i0 + 16): scores past e are neither
# computed, read nor written (p and dp are zeros when they are made, and stay so there), and the block's own masked
# entries are exact zeros. Blocks are 16 on every instruction set, because they decide where the sums over keys end.


cdef inline int64_t block_end(int64_t i0, int64_t T) noexcept nogil:
    return min(T, i0 + 16)


cdef void product(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, const float *panels,
                  int64_t packed_n, int64_t packed_k, int64_t M, int64_t N, int64_t k0, int64_t k1) noexcept nogil:
    """c[M, N] = a[M, k0:k1] . b[k0:k1, N] with b packed (all of it: packed_n columns, packed_k rows)."""
    cdef int64_t j = 0, m, k, width, depth
    while j < N:
        width = panel_width(packed_n - j)
        k = k0
        while k < k1:
            depth = min(<int64_t>DEPTH, k1 - k)
            m = 0
            while m < M:
                tile(<int>min(<int64_t>TILE_ROWS, M - m), depth, a + m * row + k * step, row, step,
                     panels + j * packed_k + k * width, width, c + m * ldc + j, ldc, k > k0, NULL, min(width, N - j))
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


cdef void softmax_row(float *p, const uint32_t *keys, int64_t seen, int64_t end, float scale) noexcept nogil:
    """p[0:end] = softmax(scale * p) over the first `seen` keys that the mask allows; 0 elsewhere, also if there are none."""
    cdef int64_t j
    cdef uint32_t bits
    cdef V top = vset(-INFINITY), total = vzero(), x, e, shift, vscale = vset(scale)
    cdef float sum
    for j in range(0, end, 16):
        bits = keys[j >> 4] & lane_bits(seen - j)
        x = vload_n(p + j, end - j)
        top = vmax(x if bits == 0xFFFF else vselect(bits, x, vset(-INFINITY)), top)
    shift = vset(vmaximum(top) * scale)                  # rounded like every scaled score: the largest is exp(0)
    for j in range(0, end, 16):
        bits = keys[j >> 4] & lane_bits(seen - j)
        e = vexp(vsub(vmul(vload_n(p + j, end - j), vscale), shift))
        if bits != 0xFFFF:
            e = vselect(bits, e, vzero())
        vstore_n(p + j, e, end - j)
        total = vadd(total, e)
    sum = vsum(total)
    e = vset(<float>1.0 / sum if sum != 0 else <float>0.0)  # 0 only where no key is seen: else the largest adds 1
    for j in range(0, end, 16):
        vstore_n(p + j, vmul(vload_n(p + j, end - j), e), end - j)


# s = scale * q . k^T; p = softmax(s) over the keys <= the query that are real; o = p . v
cdef void attention_forward(float *o, float *p, const float *q, const float *k, const float *v, const uint32_t *keys,
                            int64_t T, int64_t C, int64_t D, float *scratch) noexcept nogil:
    cdef int64_t i0, i, end, rows
    cdef float scale = <float>(1.0 / sqrt(<double>D))
    pack_right(scratch, k, C, True, T, D)
    for i0 in range(0, T, 16):
        end = block_end(i0, T)
        rows = end - i0
        product(p + i0 * T, T, q + i0 * C, C, 1, scratch, T, D, rows, end, 0, D)
        for i in range(i0, end):
            softmax_row(p + i * T, keys, i + 1, end, scale)
    pack_right(scratch, v, C, False, D, T)
    for i0 in range(0, T, 16):
        end = block_end(i0, T)
        product(o + i0 * C, C, p + i0 * T, T, 1, scratch, D, T, end - i0, D, 0, end)


# dv = p^T . do; dp = do . v^T; ds = scale * p * (dp - sum(dp * p)); dq = ds . k; dk = ds^T . q
cdef void attention_backward(float *dq, float *dk, float *dv, float *dp, const float *do_, const float *p,
                             const float *q, const float *k, const float *v,
                             int64_t T, int64_t C, int64_t D, float *scratch) noexcept nogil:
    cdef int64_t i0, i, j, end
    cdef float scale = <float>(1.0 / sqrt(<double>D))
    cdef float *ds = scratch
    cdef float *panels = scratch + T * T
    cdef V total, shift, d, vscale = vset(scale)
    pack_right(panels, do_, C, False, D, T)
    for i0 in range(0, T, 16):                           # keys i0.. are seen by the queries from i0 on
        product(dv + i0 * C, C, p + i0, 1, T, panels, D, T, block_end(i0, T) - i0, D, i0, T)
    pack_right(panels, v, C, True, T, D)
    for i0 in range(0, T, 16):
        end = block_end(i0, T)
        product(dp + i0 * T, T, do_ + i0 * C, C, 1, panels, T, D, end - i0, end, 0, D)
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
    pack_right(panels, k, C, False, D, T)
    for i0 in range(0, T, 16):
        end = block_end(i0, T)
        product(dq + i0 * C, C, ds + i0 * T, T, 1, panels, D, T, end - i0, D, 0, end)
    pack_right(panels, q, C, False, D, T)
    for i0 in range(0, T, 16):
        product(dk + i0 * C, C, ds + i0, 1, T, panels, D, T, block_end(i0, T) - i0, D, i0, T)
