# What a probe keeps (statistics.h), compiled for this instruction set like the kernels. Not an operation of a plan: the
# engine calls it at a site (hooks.pxi).

cdef extern from "tally.h" nogil:
    ctypedef struct Statistics:
        pass

cdef extern from "statistics.h" nogil:
    void statistics(const void *x, int wide, int64_t n, Statistics *s) noexcept
    void statistics_merge(Statistics *total, const Statistics *s) noexcept


def probes() -> tuple[int, int]:
    """Where the two functions stand: `statistics` and `statistics_merge`."""
    return <size_t>&statistics, <size_t>&statistics_merge
