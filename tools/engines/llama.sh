#!/bin/bash
# Compile llama-cpp-python for its tests: 5 to 10 minutes on two cores, needs g++. Then `make test` runs them too.
#
#   tools/engines/llama.sh PYTHON
#
# It lies beside what side.sh fetches, whose rules hold: no venv, nothing else installed, its reason where it fails.
set -euo pipefail

cd "$(dirname "$0")/../.."
python=$1
side=$(tools/engines/place.sh side)
mkdir -p "$side"
exec 9>"$side/.lock-llama"
flock 9
wanted="llama-cpp-python==0.3.36 diskcache==5.6.3"
if [ "$(cat "$side/llama/.wheels" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$side/llama" "$side/llama.new"
    echo "kvstored: compiling llama-cpp-python" >&2
    # shellcheck disable=SC2086 # two requirements
    "$python" -m pip --disable-pip-version-check --quiet --quiet install --no-deps --target "$side/llama.new" $wanted </dev/null >&2
    echo "$wanted" >"$side/llama.new/.wheels"
    mv "$side/llama.new" "$side/llama"
fi
echo "$side"
