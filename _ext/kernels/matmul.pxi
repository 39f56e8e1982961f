# Matrix products and the linear layer.
#
# Weights are stored (out, in), as PyTorch's nn.Linear: y = x . W^T + b. One orientation serves the layers, the tied
# head and the checkpoint that opens in PyTorch.


cdef struct Panels:                                      # the right-hand side of a product: b[depth, columns]
    const float *first
    int64_t columns
    int64_t across                                       # the panel of column j begins j * across further
    int64_t down                                         # from one of its rows to the next; 0: its width


cdef inline int64_t panel_width(int64_t n) noexcept nogil:
    """The width of the panel that starts n columns before the edge: a full one, or 16 where that is enough."""
    return 16 if n <= 16 else PANEL


cdef inline Panels standing(const float *b, int64_t ldb, int64_t N) noexcept nogil:
    """b[depth, N] as it stands, for N whole panels or vectors."""
    return Panels(b, N, 1, ldb)


cdef Panels packed(float *memory, const float *b, int64_t ldb, bint transposed, int64_t N, int64_t depth) noexcept nogil:
    """b[depth, N] written to memory, row behind row and panel behind panel."""
    cdef int64_t j = 0, width
    while j < N:
        width = panel_width(N - j)
        if transposed:
            pack_columns(memory + j * depth, width, b + j * ldb, ldb, depth, min(width, N - j))
        else:
            pack_rows(memory + j * depth, width, b + j, ldb, depth, min(width, N - j))
        j += width
    return Panels(memory, N, depth, 0)


cdef bint all_finite(Panels b, int64_t depth) noexcept nogil:
    cdef int64_t j = 0, i, k, width
    cdef const float *row
    cdef V zeros = vzero()
    while j < b.columns:
        width = panel_width(b.columns - j)
        for k in range(depth):
            row = b.first + j * b.across + k * (b.down if b.down else width)
            for i in range(0, min(width, b.columns - j), 16):
                zeros = vfma(vload_n(row + i, 16), vzero(), zeros)  # NaN where one is NaN or Inf
        j += width
    return vsum(zeros) == 0


cdef bint all_zero(const float *a, int64_t row, int64_t step, int64_t rows, int64_t depth) noexcept nogil:
    """Whether a tile of a is nothing but zeros; of a packed one whether it is known to be."""
    cdef int64_t i, k, n = depth
    if step != 1:
        if rows < TILE_ROWS:
            return False
        rows, n = 1, depth * TILE_ROWS
    for i in range(rows):
        for k in range(0, n, 16):
            if vany(vload_n(a + i * row + k, n - k)):
                return False
    return True


cdef void multiply(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, int64_t tile_step, Panels b, int64_t M,
                   int64_t depth, bint accumulate, const float *bias, bint gaps, float *own) noexcept nogil:
    """c[M, columns] = a . b (+ c) (+ bias) for at most DEPTH values of k; each tile of a stands tile_step from the last.

    With `gaps` tiles of zeros are looked for, and left out where b is finite: their sums would be 0, to the bit. `own` is an
    array like c, or NULL: its lines are taken from other cores' caches, a tile at a time.
    """
    cdef int64_t j = 0, m, width, height, taken
    cdef const float *rows
    cdef int finite = -1                                 # not known yet
    while j < b.columns:
        width = panel_width(b.columns - j)
        m = 0
        rows = a
        while m < M:
            height = min(<int64_t>TILE_ROWS, M - m)
            taken = depth
            if gaps and all_zero(rows, row, step, height, depth):
                if finite < 0:
                    finite = all_finite(b, depth)
                if finite:
                    taken = 0
            if height == TILE_ROWS:
                prefetch_rows(c + m * ldc + j, ldc)
                if own != NULL:
                    take_rows(own + m * ldc + j, ldc, min(width, b.columns - j))
            tile(<int>height, taken, rows, row, step, b.first + j * b.across, b.down if b.down else width,
                 c + m * ldc + j, ldc, accumulate, bias + j if bias != NULL else NULL, min(width, b.columns - j))
            m += TILE_ROWS
            rows += tile_step
        j += width


cdef void multiply_large(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, Panels b, int64_t M, int64_t depth,
                         bint accumulate, const float *bias, bint gaps, float *own, float *scratch) noexcept nogil:
    """The same, with the tiles of a packed first, BLOCK_TILES at a time for all panels: the block then stays in the
    second-level cache (Goto & van de Geijn, ACM TOMS 34, 2008). No bit depends on it."""
    cdef int64_t m = 0, rows
    while m < M:
        rows = min(<int64_t>BLOCK_TILES * TILE_ROWS, M - m)
        pack_left(scratch, a + m * row, row, step, rows, M - m, depth)
        multiply(c + m * ldc, ldc, scratch, 1, TILE_ROWS, TILE_FLOATS(depth), b, rows, depth, accumulate, bias, gaps,
                 own + m * ldc if own != NULL else NULL)
        m += rows


cdef void matmul(float *c, int64_t ldc, const float *a, int64_t row, int64_t step, const float *b, int64_t ldb,
                 bint transposed, int64_t M, int64_t N, int64_t K, bint accumulate, const float *bias,
                 bint gaps, float *own, float *scratch) noexcept nogil:
    """c[M, N] = a . b (+ c) (+ bias): a[i, k] at a[i*row + k*step]; b[k, j] at b[k*ldb + j], or b[j*ldb + k] if transposed.

    scratch: signatures.MATMUL_FLOATS.
    """
    cdef float *right = scratch + BLOCK_TILES * TILE_FLOATS(DEPTH)
    # Packing a is worth its while where an element serves many columns, and a has outgrown the cache or would be read
    # along addresses that share a set of it; packing b is where a is large, its rows lie across the panels, or a panel
    # ends in mid-vector. Measured.
    cdef bint large = N >= 96 and (M * K > 98304 or (row == 1 and step >= 512))
    cdef int64_t stands = 0 if transposed or large else N if N % 16 == 0 else N - N % PANEL
    cdef int64_t j = 0, k, n, depth
    cdef const float *part
    cdef const float *add
    cdef float *taken
    cdef Panels panels
    while j < N:
        n = stands if j < stands else min(<int64_t>BLOCK_COLUMNS, N - j)
        k = 0
        while k < K:
            depth = min(<int64_t>DEPTH, K - k)
            part = b + (j * ldb + k if transposed else k * ldb + j)
            panels = standing(part, ldb, n) if j < stands else packed(right, part, ldb, transposed, n, depth)
            add = bias + j if bias != NULL and k + depth == K else NULL
            taken = own + j if own != NULL and k == 0 else NULL
            if large:
                multiply_large(c + j, ldc, a + k * step, row, step, panels, M, depth, accumulate or k > 0, add, gaps, taken,
                               scratch)
            else:
                multiply(c + j, ldc, a + k * step, row, step, TILE_ROWS * row, panels, M, depth, accumulate or k > 0, add,
                         gaps, taken)
            k += depth
        j += n


# y = x . W^T + b
cdef void linear_forward(float *y, const float *x, const float *weight, const float *bias,
                         int64_t rows, int64_t K, int64_t N, float *scratch) noexcept nogil:
    matmul(y, N, x, K, 1, weight, K, True, rows, N, K, False, bias, False, NULL, scratch)


# dx (+)= dy . W; dy is 0 where the input was padding
cdef void linear_backward_input(float *dx, const float *dy, const float *weight, int64_t rows, int64_t K, int64_t N,
                                bint accumulate, float *scratch) noexcept nogil:
    matmul(dx, K, dy, N, 1, weight, K, False, rows, K, N, accumulate, NULL, True, NULL, scratch)


# dW = dy^T . x, its rows lo..hi-1
cdef void linear_backward_weight(float *dweight, float *weight, const float *dy, const float *x, int64_t rows, int64_t K,
                                 int64_t N, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    matmul(dweight + lo * K, K, dy + lo, 1, N, x, K, False, hi - lo, K, rows, False, NULL, False,
           weight + lo * K if weight != NULL else NULL, scratch)


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
