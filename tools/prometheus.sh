#!/bin/bash
# Find Prometheus and promtool, or fetch Debian's package into the user's cache; nothing is installed, no service starts.
#
#   tools/prometheus.sh [--fetch]
#
# Prints the directory of the two programs. Exit code 1, with the reason on standard error, where there are none; without
# --fetch nothing is downloaded.
set -euo pipefail

if command -v promtool >/dev/null && command -v prometheus >/dev/null; then
    dirname "$(command -v promtool)"
    exit
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvstored/prometheus
found=$cache/usr/bin
if [ ! -x "$found/promtool" ] && [ "${1-}" = --fetch ]; then
    fail() { echo "kvstored: no Prometheus: $*" >&2; exit 1; }
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || fail "this is no Debian, install prometheus yourself"
    rm -rf "$cache.new"
    mkdir -p "$cache.new"
    (cd "$cache.new" && apt-get -qq download prometheus </dev/null >/dev/null 2>&1) || fail "apt-get download prometheus failed"
    dpkg -x "$cache.new"/prometheus_*.deb "$cache.new"
    rm -rf "$cache" && mv "$cache.new" "$cache"
fi
[ -x "$found/promtool" ] || { echo "kvstored: no promtool on the PATH nor in $found: tools/prometheus.sh --fetch" >&2; exit 1; }
echo "$found"
