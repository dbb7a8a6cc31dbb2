#!/usr/bin/env bash
# Software:  pciutils 3.9.0 (Debian 12: pciutils, libpci3 1:3.9.0-4).
# Behaviour: setpci with a filter that matches no device, as when a bridge has another number after a reboot or a
#            hot-plug, reads and writes nothing and exits with 0; the only sign is a warning on stderr. A bridge
#            that is there and lacks the capability ends with 1. So `set -e` does not stop a script that
#            changes ACS bits of bridges that are gone. Shown on a dump, so that no hardware is touched.
# Seen:
#   read 00:01.0 COMMAND: status 0, '0407'
#   read 00:1f.0 COMMAND: status 0, 'setpci: Warning: No devices selected for operation group 1.'
#   write 00:1f.0 COMMAND=0: status 0, 'setpci: Warning: No devices selected for operation group 1.'
#   read 00:01.0 ECAP_ACS+6.w: status 1, 'setpci: 0000:00:01.0: Instance #0 of Extended capability 000d not found - there are no capabilities with that id.'
# Needs: apt-get with Debian 12's main suite, dpkg. No root, no PCI device.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
(cd "$dir" && apt-get download -q pciutils=1:3.9.0-4 libpci3=1:3.9.0-4 >/dev/null 2>apt.log || { cat apt.log; exit 1; }
 for package in ./*.deb; do dpkg -x "$package" tree; done)
export LD_LIBRARY_PATH="$dir/tree/usr/lib/x86_64-linux-gnu:$dir/tree/lib/x86_64-linux-gnu"
cat >"$dir/dump" <<'DUMP'
00:01.0 PCI bridge: root port
00: 86 80 30 20 07 04 10 00 04 00 04 06 10 00 01 00
10: 00 00 00 00 00 00 00 00 00 01 01 00 f0 00 00 00
20: 00 f0 f0 ff f1 ff 01 00 00 00 00 00 00 00 00 00
30: 00 00 00 00 40 00 00 00 00 00 00 00 00 00 02 00
DUMP
try() {
    local status=0 text
    text=$("$dir/tree/usr/bin/setpci" -A dump -O "dump.name=$dir/dump" -s "$2" "$3" 2>&1) || status=$?
    echo "$1 $2 $3: status $status, '$text'"
}
{ try read 00:01.0 COMMAND; try read 00:1f.0 COMMAND; try write 00:1f.0 COMMAND=0
  try read 00:01.0 ECAP_ACS+6.w; } >"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: setpci of no device succeeds"
