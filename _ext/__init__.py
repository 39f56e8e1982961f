"""The engine room: the arithmetic of the step, in Cython over small C headers.

===================  ==========================================================================================
signatures.py        what every kernel takes, one line each
kernels/*.pxi        the kernels, read like the formulas above them; ops.pxi gives each its share of the arrays
kernels_<isa>.pyx    the same source compiled for AVX-512, AVX2 + FMA, and any processor
include/             16 lanes of float, exp and log, the tile of a matrix product, Philox, threads
reference.py         the NumPy twin of every kernel: same name, same arguments
engine.pyx           programs (lists of operations) and the threads that run them
hooks.pxi            who is called between operations; include/statistics.h is what probes measure
plan.py              programs with checked arguments and named sites; which instruction set is used
===================  ==========================================================================================
"""

if __name__ != "minitrain._ext":
    raise ImportError("this folder is minitrain._ext; install the package (make) and import minitrain")
