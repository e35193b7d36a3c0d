#!/bin/sh
# Runs the kernel's tests with the kernel under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   kernel/sanitize.sh PYTHON
#
# Tensors are malloc'ed, so a read past a part's end is found. Leaks are not looked for: CPython keeps memory
# at exit on purpose. PYTHONMALLOC=malloc hands Python's own buffers to the sanitizer too.
set -eu
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/kvstored_kernel"
cp "$root/kernel/kvstored_kernel/__init__.py" "$work/kvstored_kernel/"
cxx=${CXX:-c++}
CXXFLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
    sh "$root/kernel/compile.sh" "$work/kvstored_kernel/libkvstored_kernel.so"
cd "$root"
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
    PYTHONPATH="$work:$root:$root/daemon:$root/client" \
    "$python" -m pytest -q -p no:cacheprovider -m "not slow" tests/kvstore/kernels/test_cpu.py tests/kvstore/codecs/test_nf4_kv.py tests/kvstore/codecs/test_nf4_kv2.py tests/kvstore/codecs/test_rans.py tests/kvstore/codecs/test_fuzzed.py
