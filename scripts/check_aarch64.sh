#!/bin/sh
# Does the engine compute the same bits on aarch64, and on older x86-64 processors, as on this machine?
#
#     scripts/check_aarch64.sh FOLDER [STATE]
#
# Cross-compiles the engine with setup.py's flags and trains under QEMU's user-mode emulation: the default run up to
# state 0, 100 (default) or 500, and five steps with dropout and five with untied weights. Compares the digests, and the
# statistics of two arrays, with those of this machine and with minitrain/selftest.py. Exit status 0 if all are equal.
#
# For Debian on x86-64, as root: apt installs the cross compiler and QEMU. Nothing else is changed outside FOLDER,
# which must not exist: arm64 packages are downloaded and unpacked there, unknown to the machine's dpkg.
set -eu
[ $# -ge 1 ] && [ "$(id -u)" = 0 ] || { sed -n '2,/^set/{/^set/!p}' "$0"; exit 2; }
source=$(cd "$(dirname "$0")/.." && pwd)
last=${2:-100}
unset MINITRAIN_ISA MINITRAIN_CFLAGS PYTHONPATH
mkdir "$1"
cd "$1"
work=$(pwd)

echo "== tools"
apt-get -q update
apt-get install -qy --no-install-recommends qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross

echo "== this machine: the package in an environment of its own; leaves Cython's C in tree/build/cython"
mkdir tree
(cd "$source" && cp -R pyproject.toml setup.py MANIFEST.in README.md LICENSE _ext minitrain replay "$work/tree")
find tree -name '*.so' -delete
python3 -m venv host
host/bin/pip install -q ./tree

echo "== aarch64: Python, from an apt that knows no other architecture and no installed package"
mkdir -p apt/lists/partial apt/cache/archives/partial root
: > apt/status
arm_apt() {
  apt-get -q -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root \
    -o Dir::State="$work/apt" -o Dir::State::status="$work/apt/status" -o Dir::Cache="$work/apt/cache" "$@"
}
arm_apt update
arm_apt install -y --no-install-recommends --download-only python3-minimal libpython3-dev libpython3-stdlib libstdc++6
for deb in apt/cache/archives/*.deb; do dpkg -x "$deb" root; done
python=$(basename "$(ls root/usr/bin/python3.*[0-9])")

echo "== aarch64: the dependencies' wheels, this machine's Python files, our extensions"
host/bin/pip install -q --target arm --python-version "${python#python}" --only-binary :all: \
  --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 numpy pydantic safetensors xxhash
cp -R host/lib/python3*/site-packages/minitrain arm
rm arm/minitrain/_ext/*.so
flags=$(sed -n 's/^FLAGS = \[\(.*\)\]$/\1/p' tree/setup.py | tr -d '",')
[ -n "$flags" ]
for name in engine kernels_portable; do
  # -idirafter: Python's headers from the arm64 packages, the C library's from the cross compiler
  (set -x; aarch64-linux-gnu-gcc -Wall -DNDEBUG -fwrapv -fPIC -shared $flags -I tree/_ext/include \
    -I "root/usr/include/$python" -idirafter root/usr/include \
    "tree/build/cython/_ext/$name.c" -o "arm/minitrain/_ext/$name.so")
done

cat > probe.py <<'END'
import sys
import numpy as np
from minitrain import selftest
from minitrain.config import Config
from minitrain.hooks import statistics

def show(case, config, states):
    """Print the digests of these states of a run on one thread, and of state 5 on three threads."""
    selftest.Config = lambda: config
    for threads, when in (1, states), (3, {5: None}):
        selftest.GOLDEN = when
        for step, found, expected in selftest.digests(threads):
            print(f"{case} threads {threads} state {step}: {found}", flush=True)
            if expected and expected != found:
                sys.exit(f"{case}: state {step} is not the golden {expected}")

near = (np.arange(3000) * 37 % 171 - 60).astype(np.float32) * np.float32(0.01)
broken = near.copy()
broken[[5, 900, 2999]] = np.nan, np.inf, -np.inf
for case, x in ("fast", near), ("exact", broken):
    print(f"statistics, {case}:", *(f.hex() if isinstance(f, float) else f for f in statistics(x)))

default = Config()
show("default", default, {t: d for t, d in selftest.GOLDEN.items() if t <= int(sys.argv[1])})
for case, change in ("dropout 0.1", {"dropout": 0.1}), ("untied", {"tie_weights": False}):
    show(case, default.model_copy(update={"model": default.model.model_copy(update=change)}), {5: None})
END

status=0
check() { # name, last state of the default run, then the command that starts Python there
  name=$1
  upto=$2
  shift 2
  echo "== $name: $("$@" -c 'from minitrain._ext.plan import instruction_set; print(instruction_set())')"
  start=$(date +%s)
  "$@" probe.py "$upto" > "$name.digests" || status=1
  echo "$(($(date +%s) - start)) s"
  if grep -vxFf this-machine.digests "$name.digests"; then status=1; fi # lines that this machine does not have
}
check this-machine "$last" host/bin/python
# AVX2 and FMA: Haswell, less what QEMU lacks, so that it does not warn.
check x86-64-haswell "$last" \
  qemu-x86_64-static -cpu Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid host/bin/python
# Neither: not emulated but with the C library's fmaf in software, which takes seconds a step as it is.
check x86-64-no-fma 0 \
  env MINITRAIN_ISA=portable GLIBC_TUNABLES=glibc.cpu.hwcaps=-FMA,-FMA4,-AVX2 host/bin/python
check aarch64 "$last" env PYTHONPATH=arm qemu-aarch64-static -L root "root/usr/bin/$python"
echo "== digests"
head -n 99 *.digests
[ $status = 0 ] && echo "all the same" || echo "DIFFERENT"
exit $status
