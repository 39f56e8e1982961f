"""Programs and the threads that run them; random numbers and elementary functions that are made here.

A program is a list of operations, each a kernel with its arguments already checked (plan.py does that). Running one is
a single call without the GIL: no Python object is touched, nothing is allocated.
"""

from cpython.buffer cimport Py_buffer, PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport frexp, sqrt
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

import numpy as np

cdef extern from "op.h" nogil:
    enum: OP_ARRAYS
    enum: OP_SIZES
    enum: OP_NUMBERS
    ctypedef void (*Kernel)(const Op *, int64_t, int64_t, float *) noexcept
    ctypedef struct Op:
        Kernel kernel
        void *array[12]
        int64_t size[6]
        double number[4]
        int64_t units
        int64_t before, layer, each
        int32_t split
        int32_t threads

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "pool.h" nogil:
    enum: POOL_LIMIT
    ctypedef struct CPool "Pool":
        int threads
        float **scratch
        pthread_mutex_t busy
    int pool_start(CPool *pool, int threads) noexcept
    int pool_run(CPool *pool, const Op *ops, int64_t first, int64_t last) noexcept
    void pool_stop(CPool *pool) noexcept

cdef extern from "philox.h" nogil:
    void philox4x32(uint32_t *out, uint64_t index, uint32_t site, uint32_t step, uint32_t seed, uint32_t purpose) noexcept

cdef extern from "fpenv.h" nogil:
    uint64_t fpenv_enter() noexcept
    void fpenv_set(uint64_t value) noexcept

cdef extern from "tally.h" nogil:
    ctypedef struct Statistics:
        int64_t count, zeros, nan, inf
        double mean, mean_abs, variance, min, max, l2
    ctypedef void (*Measure)(const void *x, int wide, int64_t n, Statistics *s) noexcept nogil
    ctypedef void (*Merge)(Statistics *total, const Statistics *s) noexcept nogil

cdef extern from *:
    """
    #if defined(__x86_64__)
    static int cpu_has_avx512(void) { return __builtin_cpu_supports("avx512f") != 0; }
    static int cpu_has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
    #else
    static int cpu_has_avx512(void) { return 0; }
    static int cpu_has_avx2(void) { return 0; }
    #endif
    #if defined(FP_FAST_FMAF) || defined(__FP_FAST_FMAF)
    static const int portable_fma = 1;
    #else
    static const int portable_fma = 0;
    #endif
    """
    int cpu_has_avx512() nogil
    int cpu_has_avx2() nogil
    const int portable_fma


def instruction_sets() -> list[str]:
    """What this processor can run, best first."""
    return ["avx512"] * bool(cpu_has_avx512()) + ["avx2"] * bool(cpu_has_avx2()) + ["portable"]


def portable_is_fast() -> bool:
    """Whether the portable kernels fuse multiply and add by an instruction (aarch64) or by a call of fmaf (x86-64)."""
    return bool(portable_fma)


cdef class Pool:
    """A fixed number of threads (1 to 64), of which the caller is one. Raises OSError if one cannot be started."""

    cdef CPool c
    cdef list _scratch
    cdef readonly int threads
    cdef int64_t _reserved

    def __cinit__(self, int threads=1):
        if not 1 <= threads <= POOL_LIMIT:
            raise ValueError(f"threads: expected 1 to {POOL_LIMIT}, got {threads}")
        cdef int error = pool_start(&self.c, threads)
        if error:                                        # __dealloc__ stops those that did start
            raise OSError(error, f"could not start {threads} threads; lower training.threads")
        self.threads = threads
        self._scratch = []
        self._reserved = 0

    def __dealloc__(self):
        with nogil:
            pool_stop(&self.c)

    cdef int reserve(self, int64_t floats) except -1:
        """Each thread gets at least this much scratch memory."""
        cdef int i
        cdef float[::1] view
        if floats <= self._reserved:
            return 0
        memories = [np.zeros(floats + 16, np.float32) for _ in range(self.threads)]
        with nogil:
            pthread_mutex_lock(&self.c.busy)             # not while a program works in the old memory
        for i in range(self.threads):
            skip = -(memories[i].ctypes.data // 4) % 16  # to a cache line
            view = memories[i][skip : skip + floats]
            self.c.scratch[i] = &view[0]
        self._scratch = memories
        self._reserved = floats
        pthread_mutex_unlock(&self.c.busy)
        return 0


cdef class Program:
    """Operations in order; `run(first, last)` runs those from first up to last."""

    cdef Op *ops
    cdef Pool pool
    cdef int64_t capacity
    cdef readonly int64_t length

    def __cinit__(self, Pool pool not None):
        self.pool = pool
        self.ops = NULL
        self.capacity = self.length = 0

    def __dealloc__(self):
        free(self.ops)

    def append(self, size_t kernel, list arrays, list sizes, list numbers, int64_t units, int32_t split, tuple place,
               int64_t scratch):
        """Addresses of the kernel and its arrays (0 for a missing one), dimensions, scalars, and how threads share it.

        ``place`` are elements of a layer: those before the parameter's, all, and those of a unit; zeros where it has none.
        """
        cdef Op op
        cdef Op *grown
        if len(arrays) > OP_ARRAYS or len(sizes) > OP_SIZES or len(numbers) > OP_NUMBERS:
            raise ValueError("too many arguments for an operation")
        memset(&op, 0, sizeof(Op))
        op.kernel = <Kernel>kernel
        for i, address in enumerate(arrays):
            op.array[i] = <void *><size_t>address
        for i, size in enumerate(sizes):
            op.size[i] = size
        for i, number in enumerate(numbers):
            op.number[i] = number
        op.units = units
        op.before, op.layer, op.each = place
        op.split = split
        op.threads = self.pool.threads
        self.pool.reserve(scratch)
        if self.length == self.capacity:
            grown = <Op *>realloc(self.ops, (2 * self.capacity + 16) * sizeof(Op))
            if grown == NULL:
                raise MemoryError
            self.ops = grown
            self.capacity = 2 * self.capacity + 16
        self.ops[self.length] = op
        self.length += 1

    def run(self, int64_t first, int64_t last):
        if not 0 <= first <= last <= self.length:
            raise IndexError(f"operations {first}..{last} of a program of {self.length}")
        cdef int forked
        with nogil:
            forked = pool_run(&self.pool.c, self.ops, first, last)
        if forked:
            raise RuntimeError(FORKED)


cdef str FORKED = ("the threads of this backend stayed behind in another process; after a fork make the model anew, or start "
                   "processes by spawn")

include "hooks.pxi"


cdef class Environment:
    """``with Environment():`` rounds to nearest and keeps denormals, whatever an imported library has set."""

    cdef uint64_t old

    def __enter__(self):
        self.old = fpenv_enter()

    def __exit__(self, *error):
        fpenv_set(self.old)


cdef bint borrowed(Py_buffer *view, x, bint mask, int64_t B, int64_t T) noexcept:
    """Whether x is a C-contiguous (B, T) of int32, or a mask of bool: then `view` is to be released."""
    cdef char kind                                       # a letter of struct's
    try:
        PyObject_GetBuffer(x, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except (TypeError, ValueError, BufferError):
        return False
    if view.ndim == 2 and view.shape[0] == B and view.shape[1] == T and view.format[1] == 0:
        kind = view.format[0]
        if kind == c'?' if mask else (kind == c'i' or kind == c'l') and view.itemsize == sizeof(int32_t):
            return True
    PyBuffer_Release(view)
    return False


cdef class Inputs:
    """Where a pass reads its batch, all (B, T): tokens and targets int32 below ``limit``, two masks uint8."""

    cdef int32_t[:, ::1] tokens
    cdef int32_t[:, ::1] targets
    cdef uint8_t[:, ::1] attn_pad_mask
    cdef uint8_t[:, ::1] loss_mask
    cdef int32_t limit

    def __init__(self, tokens, targets, attn_pad_mask, loss_mask, int32_t limit):
        self.tokens, self.targets, self.attn_pad_mask, self.loss_mask = tokens, targets, attn_pad_mask, loss_mask
        self.limit = limit

    def load(self, tokens, targets, attn_pad_mask, loss_mask) -> int:
        """Copy a batch, int32 and bool: -1. Nothing is copied where it is no good: at a token out of range its flat index,
        those of targets behind those of tokens; -2 where an array is of another type, shape or layout."""
        cdef int64_t B = self.tokens.shape[0], T = self.tokens.shape[1], n = B * T, i
        cdef Py_buffer view[4]
        cdef int k, held = 0
        cdef int64_t found = -2
        cdef const int32_t *source
        for x in (tokens, targets, attn_pad_mask, loss_mask):
            if not borrowed(&view[held], x, held >= 2, B, T):
                break
            held += 1
        if held == 4:
            found = -1
            for k in range(2):
                source = <const int32_t *>view[k].buf
                for i in range(n):
                    if found < 0 and <uint32_t>source[i] >= <uint32_t>self.limit:
                        found = k * n + i
        if found == -1:
            memcpy(&self.tokens[0, 0], view[0].buf, n * sizeof(int32_t))
            memcpy(&self.targets[0, 0], view[1].buf, n * sizeof(int32_t))
            memcpy(&self.attn_pad_mask[0, 0], view[2].buf, n)
            memcpy(&self.loss_mask[0, 0], view[3].buf, n)
        for k in range(held):
            PyBuffer_Release(&view[k])
        return found


# exp, log, sin and cos in double, from + - * / and sqrt alone, for what is computed once: the initial weights.
# The same functions, with their errors and sources, stand in minitrain/elementary.py for the learning rate and
# the rotary tables; here they exist because 100,000 normals in Python would take a quarter of a second.

cdef double natural_log(double x) noexcept nogil:
    """ln x of a positive normal number: 2 atanh((m-1)/(m+1)) + e ln 2, m in [sqrt(1/2), sqrt(2)). At most 2 ulp."""
    cdef int e, k
    cdef double m = frexp(x, &e), z, s, term
    if m < 0.7071067811865476:
        m *= 2
        e -= 1
    z = (m - 1) / (m + 1)
    s = 0
    for k in range(23, 0, -2):
        s = s * (z * z) + 1.0 / k
    return e * 1.9082149292705877e-10 + 2 * z * s + e * 6.93147180369123816490e-01


cdef double sine_of_turns(double x) noexcept nogil:
    """sin(2 pi x), 0 <= x < 1: to the first octant by symmetry, then the Taylor series. At most 2 ulp of 1."""
    cdef double sign = 1, t, s
    cdef int k
    if x >= 0.5:
        x -= 0.5
        sign = -1
    if x > 0.25:
        x = 0.5 - x
    t = x * 6.283185307179586
    s = 0
    for k in range(21, 0, -2):
        s = 1 - s * (t * t) / ((k + 1) * (k + 2))
    return sign * t * s


def normal(float[::1] out, double std, uint32_t seed, uint32_t purpose, uint32_t step, uint32_t site) -> None:
    """Fill with independent normals of mean 0 (Box & Muller 1958), elements 2i and 2i+1 from Philox words 4i..4i+3.

    Each pair takes two uniforms of 52 bits: u in (0, 1], r = sqrt(-2 ln u), and the angle in turns.
    """
    cdef int64_t i, n = out.shape[0]
    cdef uint32_t w[4]
    cdef double u, turn, r
    cdef double unit = 2.220446049250313e-16             # 2^-52
    cdef uint64_t environment = fpenv_enter()
    for i in range(0, n, 2):
        philox4x32(w, <uint64_t>(i // 2), site, step, seed, purpose)
        u = ((<uint64_t>w[0] << 20 | w[1] >> 12) + 1) * unit
        turn = (<uint64_t>w[2] << 20 | w[3] >> 12) * unit
        r = std * sqrt(-2 * natural_log(u))
        out[i] = <float>(r * sine_of_turns(turn + 0.25 if turn < 0.75 else turn - 0.75))
        if i + 1 < n:
            out[i + 1] = <float>(r * sine_of_turns(turn))
    fpenv_set(environment)
