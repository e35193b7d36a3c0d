#!/bin/bash
# Generate the protobuf messages from proto/.
#
#   tools/proto.sh PYTHON OUT       write OUT/kvstored_client/wire/_pb/
#   tools/proto.sh PYTHON --check   generate aside and fail if the committed code differs
#
# PYTHON has grpcio-tools. The -I mapping puts the module where it is imported from, so nothing is patched afterwards.
# Only messages: the service is spoken through generic handlers (see client/kvstored_client), with no _grpc stub.
set -euo pipefail

python=$1 out=$2

generate() {
    mkdir -p "$1/kvstored_client/wire/_pb"
    "$python" -m grpc_tools.protoc -Ikvstored_client/wire/_pb=proto/kvstored/v1 \
        --python_out="$1" --pyi_out="$1" proto/kvstored/v1/cache.proto
}

if [ "$out" != --check ]; then
    generate "$out"
    exit
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
generate "$scratch"
for file in cache_pb2.py cache_pb2.pyi; do
    if ! diff -q "$scratch/kvstored_client/wire/_pb/$file" "client/kvstored_client/wire/_pb/$file" >/dev/null; then
        echo "client/kvstored_client/wire/_pb/$file is not what proto/kvstored/v1/cache.proto generates; run: make proto" >&2
        exit 1
    fi
done
