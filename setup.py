"""Builds the engine: the same kernel source once for every instruction set of the machine it is built for."""

import os
import platform

from Cython.Build import cythonize
from setuptools import Extension, setup

# The compiler may neither fuse, reorder nor tune to its own machine: one wheel, the same bits everywhere.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-g0"]
FLAGS += os.environ.get("MINITRAIN_CFLAGS", "").split()
X86 = {
    "avx512": ["-mavx512f", "-mavx2", "-mfma", "-DMINITRAIN_AVX512"],
    "avx2": ["-mavx2", "-mfma", "-DMINITRAIN_AVX2"],
}
HEADERS = [f"_ext/include/{name}" for name in sorted(os.listdir("_ext/include"))]


def extension(name: str, flags: list[str]) -> Extension:
    return Extension(
        f"minitrain._ext.{name}",
        [f"_ext/{name}.pyx"],
        include_dirs=["_ext/include"],
        depends=HEADERS,
        extra_compile_args=FLAGS + flags,
        extra_link_args=["-pthread"],
        libraries=["m"],
    )


kernels = {**(X86 if platform.machine().lower() in ("x86_64", "amd64") else {}), "portable": []}
setup(
    ext_modules=cythonize(
        [extension("engine", [])] + [extension(f"kernels_{isa}", flags) for isa, flags in kernels.items()],
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "initializedcheck": False,
            "cdivision": True,
        },
    )
)
