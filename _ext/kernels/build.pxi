# How this module was compiled.

cdef extern from "build.h" nogil:
    const char *MINITRAIN_COMPILER
    const char *MINITRAIN_FLAGS


def compiled() -> tuple[str, str]:
    """The compiler with its version, and the flags that it was given, those that hold a path left out."""
    return MINITRAIN_COMPILER.decode(), MINITRAIN_FLAGS.decode()
