#!/bin/bash
# Build what a release consists of: a source archive and a wheel of kvstored and of kvstored-kernel, the wheels from the
# archives, so that both are known to be whole.
#
#   tools/wheels.sh PYTHON OUT
#
# PYTHON: of an environment with hatchling and pip. Nothing is fetched. CXX names the compiler of the kernel, a
# cross-compiler too: CXX=aarch64-linux-gnu-g++ gives the wheel for aarch64. The kernel's wheel is tagged for the oldest
# manylinux that has every symbol it needs (kernel/hatch_build.py): build on an old system to serve more of them.
set -euo pipefail

cd "$(dirname "$0")/.."
python=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)

build() { # DIRECTORY NAME: the archive, and the wheel of it
    (cd "$1" && "$python" -m hatchling build --target sdist --directory "$out" >/dev/null)
    "$python" -m pip --disable-pip-version-check --quiet wheel --no-index --no-deps --no-build-isolation \
        --wheel-dir "$out" "$out/$2"-[0-9]*.tar.gz </dev/null
}

build . kvstored
build kernel kvstored_kernel
ls "$out"
