#!/bin/bash
# A real systemd as process 1 of its own namespaces, on a throw-away overlay of this machine's root.
#
#   box.sh TOP UNITS CHECKOUT ENVIRONMENT
#
# TOP: an empty directory. UNITS: a directory, copied to /run/systemd/system inside. CHECKOUT, ENVIRONMENT: the sources
# and the venv under test, to be found inside at /opt/box/checkout and /opt/box/environment.
#
# Run as: unshare -Cmpnui --fork --kill-child box.sh ...
# Nothing outside TOP changes.
set -euo pipefail
top=$1 units=$2 checkout=$3 environment=$4

mount --make-rprivate /
mount -t tmpfs box "$top"
mkdir "$top"/{upper,work,root}
mount -t overlay overlay -o lowerdir=/,upperdir="$top/upper",workdir="$top/work" "$top/root"
cd "$top/root"
mount -t proc proc proc
mount --rbind /sys sys
umount -l sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs -o mode=0755 run run
# No tmpfs on tmp: the checkout may lie there, and what is written goes to the overlay anyway.
mkdir -p run/systemd/system opt/box/{checkout,environment}
mount --bind "$checkout" opt/box/checkout
mount --bind "$environment" opt/box/environment
cp -r "$units"/. run/systemd/system/
# The machine's own services are of no use here; only what the test asks for may start.
: > etc/fstab
printf 'box\n' > etc/hostname
mkdir -p old
pivot_root . old
umount -l /old 2>/dev/null || true
ip link set lo up
exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=box.target \
    --log-target=console --show-status=no --log-level=info
