# The kernels, once for every instruction set: kernels_avx512.pyx, kernels_avx2.pyx and kernels_portable.pyx are this
# file under three names, compiled with three sets of flags (setup.py).
include "lanes.pxi"
include "matmul.pxi"
include "layers.pxi"
include "attention.pxi"
include "loss.pxi"
include "update.pxi"
include "ops.pxi"
include "statistics.pxi"
include "build.pxi"
