"""The kernels of the step for avx2. See kernels/all.pxi."""
include "kernels/all.pxi"
