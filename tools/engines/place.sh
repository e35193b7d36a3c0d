#!/bin/bash
# Where engines are kept: $XDG_CACHE_HOME/kvstored/engines, else ~/.cache/kvstored/engines. Never in .venv.
#
#   tools/engines/place.sh NAME
set -euo pipefail
echo "${XDG_CACHE_HOME:-$HOME/.cache}/kvstored/engines/$1"
