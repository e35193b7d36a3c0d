#!/bin/bash
# Make a virtual environment and install into it.
#
#   tools/venv.sh PYTHON VENV                  kvstored, editable, with all extras, pinned by constraints.txt
#   tools/venv.sh --bare PYTHON VENV WHAT...   only WHAT (words for `pip install`)
#
# What an index gives is installed only if its SHA-256 is in tools/locks (`make lock` writes them, of all platforms'
# files). The exception is torch, by version alone: each index has builds of its own (+cpu, CUDA, ROCm, a wheel on this
# machine), of one version and with other bytes, and which one is wanted is the machine's matter. What a CUDA build
# needs beside it comes with it.
#
# Safe to run again: an existing environment is brought up to date, a half-made one is made anew.
set -euo pipefail

bare=
if [ "${1-}" = --bare ]; then bare=1; shift; fi
python=$1 venv=$2
shift 2

fail() { echo "kvstored: $*" >&2; exit 1; }

right_version() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! right_version "$python"; then
    right_version python3 || fail "Python 3.11 or newer is needed; install it, or say where it is: make PYTHON=/path/to/python3.11 ..."
    python=python3
fi

# Debian ships Python without ensurepip; the package that has it is named after the interpreter.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "kvstored: this Python has no ensurepip; as root I run: apt-get update; apt-get install -y python$version-venv"
        apt-get -qq update </dev/null || true
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "python$version-venv" </dev/null >/dev/null
    else
        fail "this Python has no ensurepip; install it first: sudo apt-get install python$version-venv"
    fi
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "kvstored: making $venv"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@" </dev/null; }

locked() { # NAME: install what tools/locks/NAME.lock has, and of it only the bytes that were locked
    # --no-deps: the lock is complete. Wheels only: to build a source would fetch what builds it, and run it, unlocked.
    pip install --require-hashes --no-deps --only-binary :all: --requirement "tools/locks/$1.lock" ||
        fail "not installed: see above. If it is a hash, the index gave a file with other bytes than tools/locks/$1.lock has: do not use that index, or look why; after a change of versions run: make lock"
}

# The installers themselves: ensurepip's are whatever this Python was released with.
locked installers

if [ -n "$bare" ]; then
    pip install "$@"
    exit
fi

echo "kvstored: installing into $venv (a few minutes the first time: torch and transformers are large)"
locked all
pip install --constraint constraints.txt "$(grep -E '^torch==' constraints.txt)"
# Without isolation and index: the build uses the locked hatchling, and an extra that the lock does not have fails here.
# The kernel is no package of an index here: kernel/kernel.mk compiles this tree's and installs it, where a compiler is.
pip install --no-index --no-build-isolation --no-deps --editable .
wanted=$("$venv/bin/python" - daemon transformers demo bench dev <<'END'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for name in [*project["dependencies"], *(name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra])]:
    if not name.startswith("kvstored-kernel"):
        print(name)
END
)
pip install --no-index --requirement <(echo "$wanted")
