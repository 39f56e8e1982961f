# Matrix products and the linear layer.
#
# Weights are stored (out, in), as PyTorch's nn.Linear: y = x . W^T + b. One orientation serves the layers, the tied
# head and the checkpoint that opens in PyTorch.


cdef inline int64_t panel_width(int64_t n) noexcept nogil:
    """The width of the panel that starts n columns before the edge: a full one, or 16 where that is enough."""
    return 16 if n <= 16 else PANEL


cdef void pack_right(float *right, const float *b, int64_t ldb, bint transposed, int64_t N, int64_t depth) noexcept nogil:
    """b[depth, N] in panels, one after the other: the one of column j starts at j * depth."""
    cdef int64_t j = 0, width
    while j < N:
        width = panel_width(N - j)
        if transposed:
            pack_columns(right + j * depth, width, b + j * ldb, ldb, depth, min(width, N - j))
        else:
            pack_rows(right + j * depth, width, b + j, ldb, depth, min(width, N - j))
        j += width


cdef void multiply_panels(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, int64_t tile_step,
                          const float *right, int64_t across, int64_t down, int64_t M, int64_t N, int64_t depth,
                          bint accumulate, const float *bias) noexcept nogil:
    """c[M, N] = a . right (+ c) (+ bias) for at most DEPTH values of k; each tile of a stands tile_step from the last.

    The panel of column j begins at j * across, its rows are `down` apart (0: one right behind the other)."""
    cdef int64_t j = 0, m, width
    cdef const float *rows
    while j < N:
        width = panel_width(N - j)
        m = 0
        rows = a
        while m < M:
            if M - m >= TILE_ROWS:
                prefetch_rows(c + m * ldc + j, ldc)
            tile(<int>min(<int64_t>TILE_ROWS, M - m), depth, rows, row, step, right + j * across,
                 down if down else width, c + m * ldc + j, ldc, accumulate, bias + j if bias != NULL else NULL, min(width, N - j))
            m += TILE_ROWS
            rows += tile_step
        j += width


cdef void multiply(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, const float *right, int64_t M,
                   int64_t N, int64_t depth, bint accumulate, const float *bias, bint large, float *scratch) noexcept nogil:
    """The same, with the tiles of a large a packed first, BLOCK_TILES at a time for all panels: the block then stays in
    the second-level cache (Goto & van de Geijn, ACM TOMS 34, 2008). No bit depends on it."""
    cdef int64_t m = 0, rows
    if not large:
        multiply_panels(c, ldc, a, row, step, TILE_ROWS * row, right, depth, 0, M, N, depth, accumulate, bias)
        return
    while m < M:
        rows = min(<int64_t>BLOCK_TILES * TILE_ROWS, M - m)
        pack_left(scratch, a + m * row, row, step, rows, M - m, depth)
        multiply_panels(c + m * ldc, ldc, scratch, 1, TILE_ROWS, TILE_FLOATS(depth), right, depth, 0, rows, N, depth,
                        accumulate, bias)
        m += rows


cdef void matmul(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, const float *b, int64_t ldb,
                 bint transposed, int64_t M, int64_t N, int64_t K, bint accumulate, const float *bias,
                 float *scratch) noexcept nogil:
    """c[M, N] = a . b (+ c) (+ bias): a[i, k] at a[i*row + k*step]; b[k, j] at b[k*ldb + j], or b[j*ldb + k] if transposed.

    scratch: signatures.MATMUL_FLOATS.
    """
    cdef float *right = scratch + BLOCK_TILES * TILE_FLOATS(DEPTH)
    # Packing a is worth its while where an element serves many columns, and a has outgrown the cache or would be read
    # along addresses that share a set of it. Measured.
    cdef bint large = N >= 96 and (M * K > 98304 or (row == 1 and step >= 512))
    # Packing b is not, where its rows lie as the panels need them and a few tiles read them: for whole panels at least.
    cdef int64_t direct = 0 if transposed or large else N if N % 16 == 0 else N - N % PANEL
    cdef int64_t j = 0, k, n, depth
    cdef const float *from_bias
    while j < N:
        n = min(<int64_t>BLOCK_COLUMNS, (direct if j < direct else N) - j)
        k = 0
        while k < K:
            depth = min(<int64_t>DEPTH, K - k)
            from_bias = bias + j if bias != NULL and k + depth == K else NULL
            if j < direct:
                multiply_panels(c + j, ldc, a + k * step, row, step, TILE_ROWS * row, b + k * ldb + j, 1, ldb, M, n, depth,
                                accumulate or k > 0, from_bias)
            else:
                pack_right(right, b + (j * ldb + k if transposed else k * ldb + j), ldb, transposed, n, depth)
                multiply(c + j, ldc, a + k * step, row, step, right, M, n, depth, accumulate or k > 0, from_bias, large, scratch)
            k += depth
        j += n


# y = x . W^T + b
cdef void linear_forward(float *y, const float *x, const float *weight, const float *bias,
                         int64_t rows, int64_t K, int64_t N, float *scratch) noexcept nogil:
    matmul(y, N, x, K, 1, weight, K, True, rows, N, K, False, bias, scratch)


# dx (+)= dy . W
cdef void linear_backward_input(float *dx, const float *dy, const float *weight, int64_t rows, int64_t K, int64_t N,
                                bint accumulate, float *scratch) noexcept nogil:
    matmul(dx, K, dy, N, 1, weight, K, False, rows, K, N, accumulate, NULL, scratch)


# dW = dy^T . x, the columns lo..hi-1 of it
cdef void linear_backward_weight(float *dweight, const float *dy, const float *x, int64_t rows, int64_t K, int64_t N,
                                 int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    matmul(dweight + lo, K, dy, 1, N, x + lo, K, False, N, hi - lo, rows, False, NULL, scratch)


# db = sum of dy over the rows: here the sum of one sequence, row after row; sum_sequences adds the sequences
cdef void bias_backward(float *dbias, const float *dy, int64_t rows, int64_t N) noexcept nogil:
    cdef int64_t i, j
    for j in range(0, N, 16):
        vstore_n(dbias + j, vzero(), N - j)
    for i in range(rows):
        for j in range(0, N, 16):
            vstore_n(dbias + j, vadd(vload_n(dbias + j, N - j), vload_n(dy + i * N + j, N - j)), N - j)


# total = sum over the sequences, in order; columns lo..hi-1
cdef void sum_sequences(float *total, const float *partial, int64_t B, int64_t N, int64_t lo, int64_t hi) noexcept nogil:
    cdef int64_t b, j
    cdef V s
    for j in range(lo, hi, 16):
        s = vload_n(partial + j, hi - j)
        for b in range(1, B):
            s = vadd(s, vload_n(partial + b * N + j, hi - j))
        vstore_n(total + j, s, hi - j)
