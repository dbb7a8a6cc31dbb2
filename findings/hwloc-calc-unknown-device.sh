#!/usr/bin/env bash
# Software:  hwloc 2.9.0 (Debian 12: hwloc-nox, libhwloc15 2.9.0-1), on a made-up machine of four NUMA nodes.
# Behaviour: hwloc-calc asked for the NUMA nodes near a device that is not there (a name that changed, a disk taken
#            out) ignores the device, with a line on stderr, and exits with 0. With --local-memory the answer is every
#            node of the machine, as for a device equally near to all; with -N 0, else an empty line or 0x0.
#            hwloc-info of a missing device prints nothing and exits with 0, too. hwloc-bind refuses.
# Seen:
#   hwloc-calc --local-memory os=nvme9n1: status 0, '0,1,2,3'
#   hwloc-calc --local-memory pci=0000:99:00.0: status 0, '0,1,2,3'
#   hwloc-calc -N numanode os=nvme9n1: status 0, '0'
#   hwloc-calc -I numanode os=nvme9n1: status 0, ''
#   hwloc-calc os=nvme9n1: status 0, '0x0'
#   hwloc-info os=nvme9n1: status 0, ''
#   stderr of the first: invalid OS device nvme9n1; ignored unrecognized argument os=nvme9n1
# Needs: apt-get with Debian 12's main suite, dpkg. No root, no device.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
(cd "$dir" && apt-get download -q hwloc-nox=2.9.0-1 libhwloc15=2.9.0-1 >/dev/null 2>apt.log || { cat apt.log; exit 1; }
 for package in ./*.deb; do dpkg -x "$package" tree; done)
export LD_LIBRARY_PATH="$dir/tree/usr/lib/x86_64-linux-gnu"
try() {
    local tool=$1 status=0 text
    shift
    text=$("$dir/tree/usr/bin/$tool" -i "numa:4 core:2 pu:1" "$@" 2>"$dir/log") || status=$?
    echo "$tool $*: status $status, '$text'"
}
{ try hwloc-calc --local-memory os=nvme9n1
  said=$(paste -sd ';' "$dir/log" | sed 's/;/; /g')
  try hwloc-calc --local-memory pci=0000:99:00.0
  try hwloc-calc -N numanode os=nvme9n1
  try hwloc-calc -I numanode os=nvme9n1
  try hwloc-calc os=nvme9n1
  try hwloc-info os=nvme9n1
  echo "stderr of the first: $said"; } >"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: a missing device is near to every node"
