#!/bin/bash
# Fetch the engines' wheels without their dependencies, for the tests of their interfaces, and Triton for the tests of
# our kernels for it: no venv, about 2 GB on disk, a minute or two the first time, nothing afterwards. Prints the
# directory; in it a folder for each engine.
#
#   tools/engines/side.sh PYTHON
#
# A wheel that cannot be had leaves its reason in the file why-ENGINE, which the skipped test then tells; it is tried
# again the next time. What the interfaces import and never call has a stand-in in tests/e2e/adapters/stubs.py.
# Never torch: the one in PYTHON's environment is used (from an index it would be a CUDA build of gigabytes).
# llama.cpp has no wheel and takes minutes to compile: tools/engines/llama.sh, run by `make engines`.
set -euo pipefail

cd "$(dirname "$0")/../.."
python=$1
side=$(tools/engines/place.sh side)
mkdir -p "$side"
# Two test runs may start at once.
exec 9>"$side/.lock"
flock 9

unreachable=
fetch() { # ENGINE: the folder of what tools/locks/ENGINE.lock has, remade when its pins have changed
    local engine=$1 wanted
    wanted=$(paste -sd ' ' "tools/locks/$engine.in")
    local folder=$side/$engine
    rm -f "$side/why-$engine"
    if [ "$(cat "$folder/.wheels" 2>/dev/null)" = "$wanted" ]; then return; fi
    if [ -n "$unreachable" ]; then
        cp "$unreachable" "$side/why-$engine"
        return
    fi
    echo "kvstored: fetching $engine for its tests" >&2
    rm -rf "$folder" "$folder.new"
    local status=0
    timeout 200 "$python" -m pip --disable-pip-version-check --quiet --quiet install --no-deps --no-compile \
        --require-hashes --only-binary :all: --retries 2 --timeout 60 --target "$folder.new" \
        --requirement "tools/locks/$engine.lock" </dev/null >"$side/pip.log" 2>&1 || status=$?
    if [ $status = 0 ]; then
        echo "$wanted" >"$folder.new/.wheels"
        mv "$folder.new" "$folder"
    else
        rm -rf "$folder.new"
        echo "the wheels of $engine cannot be had: $(grep -v '^WARNING' "$side/pip.log" | tail -n 1) (exit code $status)" >"$side/why-$engine"
        cat "$side/why-$engine" >&2
        # No answer in that time: the others would take as long.
        if [ $status = 124 ]; then unreachable=$side/why-$engine; fi
    fi
}

fetch shared
fetch lmcache
fetch sglang
fetch vllm
# For transformers below 5.3, which wants older companions than ours.
fetch kvpress
# Not in the environment, where torch would find it and compile for a GPU that is not there.
fetch triton
echo "$side"
