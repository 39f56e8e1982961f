"""The kernels of the step for portable. See kernels/all.pxi."""
include "kernels/all.pxi"
