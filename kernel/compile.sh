#!/bin/sh
# Compiles the kernel: sh compile.sh OUTPUT.so. CXX names the compiler, CXXFLAGS adds to its flags.
# No fused multiply-add but where it is written (-ffp-contract=off): the bytes must be those of the torch reference.
# Functions begin with a cache's line: where they lie must not be what a change elsewhere makes of it (a decoder was 1.3
# times as slow for the same instructions).
set -eu
out=$1
here=$(cd "$(dirname "$0")" && pwd)
cxx=${CXX:-c++}
flags="-std=c++17 -O3 -fPIC -falign-functions=64 -ffp-contract=off -fno-math-errno -fvisibility=hidden -Wall -Wextra ${CXXFLAGS:-}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# shellcheck disable=SC2086
$cxx $flags -c "$here/src/isa.cpp" -o "$work/portable.o"
# shellcheck disable=SC2086
$cxx $flags -c "$here/src/dispatch.cpp" -o "$work/dispatch.o"
case $($cxx $flags -dumpmachine) in
x86_64*)
    # shellcheck disable=SC2086
    $cxx $flags -DKVK_USE_AVX2 -mavx2 -mfma -mf16c -c "$here/src/isa.cpp" -o "$work/avx2.o"
    # -Wno-*: GCC 12 warns inside its own avx512fintrin.h.
    wide="-Wno-uninitialized -Wno-maybe-uninitialized -Wno-array-bounds -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    # shellcheck disable=SC2086
    $cxx $flags $wide -DKVK_USE_AVX512 -c "$here/src/isa.cpp" -o "$work/avx512.o"
    # shellcheck disable=SC2086
    $cxx $flags $wide -mavx512vbmi -mavx512vnni -DKVK_USE_AVX512VBMI -c "$here/src/isa.cpp" -o "$work/avx512vbmi.o"
    ;;
esac
# shellcheck disable=SC2086
$cxx $flags -shared -pthread "$work"/*.o -o "$out.new"
# Never written in place: a running process may have the old one mapped.
mv "$out.new" "$out"
