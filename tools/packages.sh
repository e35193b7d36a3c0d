#!/bin/bash
# Install the Debian packages that the tests call beside Python: a compiler for the codec kernel and the fault injector,
# a browser for the status page, systemd for the service, and the tools that make namespaces, file systems, certificates.
#
#   tools/packages.sh
#
# Does nothing where all of them are there. Where it may not install (no root, no apt-get), or an install fails, it says
# what is missing and goes on: the tests that need it are skipped, and the last lines of their log say which and why.
# python3.11-venv is installed by tools/venv.sh.
set -euo pipefail

missing=()
need() { # COMMAND PACKAGE
    if ! command -v "$1" >/dev/null && [[ " ${missing[*]-} " != *" $2 "* ]]; then missing+=("$2"); fi
}
PATH=$PATH:/usr/sbin:/sbin
need make make
need git git
need cc gcc
need g++ g++
need openssl openssl
need mkfs.ext4 e2fsprogs
need losetup mount
need unshare util-linux
need ip iproute2
need systemd-analyze systemd
if ! command -v google-chrome >/dev/null; then need chromium chromium; fi

if [ ${#missing[@]} = 0 ]; then exit; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "kvstored: not installed, and not mine to install without root and apt-get: ${missing[*]}" >&2
    exit
fi
echo "kvstored: the tests call these, and as root I install them: apt-get update; apt-get install -y ${missing[*]}"
apt-get -qq update </dev/null || true
# One by one: a package that this Debian does not have must not keep the others away.
for package in "${missing[@]}"; do
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$package" </dev/null >/dev/null ||
        echo "kvstored: $package could not be installed; what needs it is not tested" >&2
done
