"""Builds the engine: the same kernel source once for every instruction set of the machine it is built for."""

import json
import os
import platform
import shlex
import shutil
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# The compiler may neither fuse, reorder nor tune to its own machine: one wheel, the same bits everywhere.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-g0"]
KERNELS: dict[str, list[str]] = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS += ["-march=x86-64", "-mtune=generic"]  # the last -march counts: CFLAGS=-march=native reaches no wheel
    KERNELS["avx2"] = ["-mavx2", "-mfma", "-DMINITRAIN_AVX2"]
    KERNELS["avx512"] = ["-mavx512f", "-mavx2", "-mfma", "-DMINITRAIN_AVX512"]
FLAGS += shlex.split(os.environ.get("MINITRAIN_CFLAGS", ""))


def told(flags: list[str]) -> str:
    """A C string for ``minitrain --version``: the flags of the environment first, as given; none that holds a path."""
    environment = shlex.split(os.environ.get("CFLAGS", ""))
    return json.dumps(" ".join(flag for flag in environment + flags if "/" not in flag))


def extension(name: str, flags: list[str]) -> Extension:
    return Extension(
        f"minitrain._ext.{name}",
        [f"_ext/{name}.pyx"],
        include_dirs=["_ext/include"],
        depends=["setup.py", *map(str, sorted(Path("_ext/include").iterdir()))],
        define_macros=[("MINITRAIN_FLAGS", told(FLAGS + flags))],
        extra_compile_args=FLAGS + flags,
        extra_link_args=["-pthread"],
        libraries=["m"],
    )


class BuildFresh(build_py):
    """Builds from nothing: a module deleted from the sources would reach the wheel from an earlier build/lib.*."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "minitrain", ignore_errors=True)
        super().run()


setup(
    cmdclass={"build_py": BuildFresh},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        [extension("engine", [])] + [extension(f"kernels_{isa}", flags) for isa, flags in KERNELS.items()],
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "initializedcheck": False,
            "cdivision": True,
        },
    ),
)
