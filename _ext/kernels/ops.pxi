# From an operation to its kernel: which part of the arrays the units lo..hi-1 are.
#
# An array (B, T, C) begins its sequence b at b*T*C. Arrays and sizes stand in the order of signatures.py.


cdef extern from "op.h" nogil:
    ctypedef struct Op:
        void *array[12]
        int64_t size[6]
        double number[4]
        int32_t threads


cdef inline float *f32(const Op *op, int i) noexcept nogil:
    return <float *>op.array[i]


cdef inline float *at(const Op *op, int i, int64_t offset) noexcept nogil:
    return <float *>op.array[i] + offset if op.array[i] != NULL else NULL


cdef inline int32_t *i32(const Op *op, int i, int64_t offset) noexcept nogil:
    return <int32_t *>op.array[i] + offset


cdef inline uint8_t *u8(const Op *op, int i, int64_t offset) noexcept nogil:
    return <uint8_t *>op.array[i] + offset


# sizes B T N K
cdef void op_linear_forward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], N = op.size[2], K = op.size[3]
    linear_forward(at(op, 0, lo * T * N), at(op, 1, lo * T * K), f32(op, 2), at(op, 3, 0), (hi - lo) * T, K, N, scratch)


# sizes B T K N
cdef void op_linear_backward_input(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], K = op.size[2], N = op.size[3]
    linear_backward_input(at(op, 0, lo * T * K), at(op, 1, lo * T * N), f32(op, 2), (hi - lo) * T, K, N,
                          op.number[0] != 0, scratch)


# sizes N K B T; units: strips of dweight
cdef void op_linear_backward_weight(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t N = op.size[0], K = op.size[1], rows = op.size[2] * op.size[3]
    cdef float *weight = f32(op, 1) if op.threads > 1 else NULL
    linear_backward_weight(f32(op, 0), weight, f32(op, 2), f32(op, 3), rows, K, N, 16 * lo, min(16 * hi, N), scratch)


# sizes B N T
cdef void op_bias_backward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t N = op.size[1], T = op.size[2], b
    for b in range(lo, hi):
        bias_backward(at(op, 0, b * N), at(op, 1, b * T * N), T, N)


# sizes N B; units: strips, of 16 elements here
cdef void op_sum_sequences(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    sum_sequences(f32(op, 0), f32(op, 1), op.size[1], op.size[0], 16 * lo, min(16 * hi, op.size[0]))


# sizes B T C V
cdef void op_embedding_forward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], C = op.size[2]
    embedding_forward(at(op, 0, lo * T * C), i32(op, 1, lo * T), f32(op, 2), (hi - lo) * T, C)


# sizes V C B T; units: strips of dweight
cdef void op_embedding_backward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    embedding_backward(f32(op, 0), i32(op, 1, 0), f32(op, 2), op.size[2] * op.size[3], op.size[1], 16 * lo,
                       min(16 * hi, op.size[0]), op.number[0] != 0)


# sizes B T C
cdef void op_layernorm_forward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], C = op.size[2]
    layernorm_forward(at(op, 0, lo * T * C), at(op, 1, lo * T), at(op, 2, lo * T), at(op, 3, lo * T * C),
                      f32(op, 4), f32(op, 5), <float>op.number[0], (hi - lo) * T, C)


# sizes B T C
cdef void op_layernorm_backward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], C = op.size[2], b, x
    for b in range(lo, hi):
        x = b * T * C
        layernorm_backward(at(op, 0, x), at(op, 1, b * C), at(op, 2, b * C), at(op, 3, x), at(op, 4, x), at(op, 5, x),
                           at(op, 6, b * T), at(op, 7, b * T), f32(op, 8), T, C)


# sizes B T C
cdef void op_gelu_forward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t n = op.size[1] * op.size[2], x = lo * n
    gelu_forward(at(op, 0, x), at(op, 1, x), at(op, 2, x), (hi - lo) * n)


# sizes B T C
cdef void op_gelu_backward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t n = op.size[1] * op.size[2], x = lo * n
    gelu_backward(at(op, 0, x), at(op, 1, x), at(op, 2, x), (hi - lo) * n)


# sizes B T C
cdef void op_residual_forward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t n = op.size[1] * op.size[2], x = lo * n
    residual_forward(at(op, 0, x), at(op, 1, x), at(op, 2, x), (hi - lo) * n)


# sizes B T C
cdef void op_rope(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], C = op.size[2], b
    for b in range(lo, hi):
        rope(at(op, 0, b * T * C), f32(op, 1), f32(op, 2), T, C, <float>op.number[0])


# sizes B T C
cdef void op_dropout(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t n = op.size[1] * op.size[2]
    dropout(f32(op, 0), f32(op, 1), <uint32_t *>op.array[2], <uint32_t>op.number[0], op.number[1], lo * n, (hi - lo) * n)


# sizes B T C H
cdef void op_attention_forward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], C = op.size[2], H = op.size[3], D = C // H, b, h, x
    cdef uint32_t *keys = <uint32_t *>scratch
    for b in range(lo, hi):
        key_lanes(keys, u8(op, 5, b * T), T)
        for h in range(H):
            x = b * T * C + h * D
            attention_forward(at(op, 0, x), at(op, 1, (b * H + h) * T * T), at(op, 2, x), at(op, 3, x), at(op, 4, x),
                              keys, T, C, D, scratch + T)


# sizes B T C H
cdef void op_attention_backward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], C = op.size[2], H = op.size[3], D = C // H, b, h, x, y
    for b in range(lo, hi):
        for h in range(H):
            x = b * T * C + h * D
            y = (b * H + h) * T * T
            attention_backward(at(op, 0, x), at(op, 1, x), at(op, 2, x), at(op, 3, y), at(op, 4, x), at(op, 5, y),
                               at(op, 6, x), at(op, 7, x), at(op, 8, x), T, C, D, scratch)


# sizes B T V
cdef void op_cross_entropy_forward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], vocab = op.size[2], b, x
    for b in range(lo, hi):
        x = b * T * vocab
        cross_entropy_forward(at(op, 0, b * T), at(op, 1, x), at(op, 2, x), at(op, 3, x), i32(op, 4, b * T),
                              u8(op, 5, b * T), T, vocab, scratch)


# sizes R B T (R = 3)
cdef void op_mean_loss(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    mean_loss(<double *>op.array[0], f32(op, 1), u8(op, 2, 0), op.size[1] * op.size[2])


# sizes B T V R
cdef void op_cross_entropy_backward(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t T = op.size[1], vocab = op.size[2], x = lo * T * vocab
    cross_entropy_backward(at(op, 0, x), at(op, 1, x), i32(op, 2, lo * T), u8(op, 3, lo * T), <double *>op.array[4],
                           (hi - lo) * T, vocab)


# sizes G P; units: blocks of 4096
cdef void op_square_sums(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    square_sums(<double *>op.array[0], f32(op, 1), op.size[1], lo, hi)


# sizes R G
cdef void op_norm(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    norm(<double *>op.array[0], <double *>op.array[1], op.size[1])


# sizes P R; units: 16 elements
cdef void op_scale(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    scale(at(op, 0, 16 * lo), <double *>op.array[1], min(16 * hi, op.size[0]) - 16 * lo)


# sizes P R; units: 16 elements
cdef void op_clamp(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    clamp(at(op, 0, 16 * lo), <double *>op.array[1], min(16 * hi, op.size[0]) - 16 * lo)


# sizes P E S R; units: 16 elements
cdef void op_adamw(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef Hyper h = in_lanes(<double *>op.array[6])
    adamw(State(f32(op, 0), f32(op, 1), f32(op, 2)), State(NULL, NULL, NULL), NULL, f32(op, 3), <int64_t *>op.array[4],
          u8(op, 5, 0), &h, 16 * lo, min(16 * hi, op.size[0]))


# sizes P G L E S R (L = 4); units: blocks of 4096
cdef void op_adamw_copying(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef State at = State(f32(op, 0), f32(op, 1), f32(op, 2)), copy = State(f32(op, 3), f32(op, 4), f32(op, 5))
    cdef uint32_t *sums
    cdef uint8_t *todo = u8(op, 7, 0)
    cdef Hyper h = in_lanes(<double *>op.array[11])
    cdef int64_t b, start, end
    for b in range(lo, hi):
        start, end = 4096 * b, min(4096 * (b + 1), op.size[0])
        sums = <uint32_t *>op.array[6] + 4 * b
        if todo[b] == 1 or (todo[b] == 2 and unchanged(at, sums, start, end)):
            adamw(at, copy, sums, f32(op, 8), <int64_t *>op.array[9], u8(op, 10, 0), &h, start, end)
            todo[b] = 0
    vstream_end()


# sizes P E S R; units: 16 elements
cdef void op_adamw_theta(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    adamw_theta(f32(op, 0), f32(op, 1), f32(op, 2), <int64_t *>op.array[3], u8(op, 4, 0), <double *>op.array[5],
                op.size[2], 16 * lo, min(16 * hi, op.size[0]))


# sizes P
cdef void op_exp(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t i, n = op.size[0]
    for i in range(0, n, 16):
        vstore_n(at(op, 0, i), vexp(vload_n(at(op, 1, i), n - i)), n - i)


# sizes P
cdef void op_log(const Op *op, int64_t lo, int64_t hi, float *scratch) noexcept nogil:
    cdef int64_t i, n = op.size[0]
    for i in range(0, n, 16):
        vstore_n(at(op, 0, i), vlog(vload_n(at(op, 1, i), n - i)), n - i)


def addresses() -> dict[str, int]:
    """Where the kernels of this instruction set stand, by name."""
    return {
        "linear_forward": <size_t>&op_linear_forward,
        "linear_backward_input": <size_t>&op_linear_backward_input,
        "linear_backward_weight": <size_t>&op_linear_backward_weight,
        "bias_backward": <size_t>&op_bias_backward,
        "sum_sequences": <size_t>&op_sum_sequences,
        "embedding_forward": <size_t>&op_embedding_forward,
        "embedding_backward": <size_t>&op_embedding_backward,
        "layernorm_forward": <size_t>&op_layernorm_forward,
        "layernorm_backward": <size_t>&op_layernorm_backward,
        "gelu_forward": <size_t>&op_gelu_forward,
        "gelu_backward": <size_t>&op_gelu_backward,
        "residual_forward": <size_t>&op_residual_forward,
        "rope": <size_t>&op_rope,
        "dropout": <size_t>&op_dropout,
        "attention_forward": <size_t>&op_attention_forward,
        "attention_backward": <size_t>&op_attention_backward,
        "cross_entropy_forward": <size_t>&op_cross_entropy_forward,
        "mean_loss": <size_t>&op_mean_loss,
        "cross_entropy_backward": <size_t>&op_cross_entropy_backward,
        "square_sums": <size_t>&op_square_sums,
        "norm": <size_t>&op_norm,
        "scale": <size_t>&op_scale,
        "clamp": <size_t>&op_clamp,
        "adamw": <size_t>&op_adamw,
        "adamw_copying": <size_t>&op_adamw_copying,
        "adamw_theta": <size_t>&op_adamw_theta,
        "exp": <size_t>&op_exp,
        "log": <size_t>&op_log,
    }
