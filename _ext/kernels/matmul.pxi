# Matrix products and the linear layer.
#
# Weights are stored (out, in), as PyTorch's nn.Linear: y = x . W^T + b. One orientation serves the layers, the tied
# head and the checkpoint that opens in PyTorch.


cdef inline int64_t panel_width(int64_t n) noexcept nogil:
    """The width of the panel that starts n columns before the edge: a full one, or 16 where that is enough."""
    return 16 if n <= 16 else PANEL


cdef void multiply_panel(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, const float *panel,
                         int64_t width, int64_t M, int64_t n, int64_t depth, bint accumulate, const float *bias) noexcept nogil:
    """c[M, n] = a[M, depth] . panel[depth, n] for one packed panel and at most DEPTH values of k."""
    cdef int64_t m = 0
    while m < M:
        tile(<int>min(<int64_t>TILE_ROWS, M - m), depth, a + m * row, row, step, panel, width,
             c + m * ldc, ldc, accumulate, bias, n)
        m += TILE_ROWS


cdef void matmul(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, const float *b, int64_t ldb,
                 bint transposed, int64_t M, int64_t N, int64_t K, bint accumulate, const float *bias,
                 float *scratch) noexcept nogil:
    """c[M, N] = a . b (+ c) (+ bias): a[i, k] at a[i*row + k*step]; b[k, j] at b[k*ldb + j], or b[j*ldb + k] if transposed.

    scratch: DEPTH * PANEL floats.
    """
    cdef int64_t k = 0, j, depth, width
    while k < K:
        depth = min(<int64_t>DEPTH, K - k)
        j = 0
        while j < N:
            width = panel_width(N - j)
            if transposed:
                pack_columns(scratch, width, b + j * ldb + k, ldb, depth, min(width, N - j))
            else:
                pack_rows(scratch, width, b + k * ldb + j, ldb, depth, min(width, N - j))
            multiply_panel(c + j, ldc, a + k * step, row, step, scratch, width, M, min(width, N - j), depth,
                           accumulate or k > 0, bias + j if bias != NULL and k + depth == K else NULL)
            j += width
        k += depth


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
