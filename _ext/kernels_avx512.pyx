"""The kernels of the step for avx512. See kernels/all.pxi."""
include "kernels/all.pxi"
