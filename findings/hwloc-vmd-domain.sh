#!/usr/bin/env bash
# Software:  hwloc 2.9.0 (Debian 12: hwloc-nox, libhwloc15 2.9.0-1).
# Behaviour: a PCI domain above ffff (Intel VMD puts NVMe disks into domain 10000) does not fit. lstopo drops the
#            bridges and the disk's PCI function, with a warning on stderr and exit status 0, and hangs the block
#            device below the whole machine: in the XML that it writes the disk has no bus, and looks
#            equally near to every GPU.
# Seen:
#   bridges and functions in: 0000:00:01.0 0000:01:00.0 10000:00:02.0 10000:01:00.0
#   bridges and functions out: 0000:00:01.0 0000:01:00.0
#   parent of nvme0n1 in: PCIDev, out: Machine
#   exit status 0, warning: Ignoring PCI device with non-16bit domain.
# Needs: apt-get with Debian 12's main suite, dpkg, python3. No root, no PCI device.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
(cd "$dir" && apt-get download -q hwloc-nox=2.9.0-1 libhwloc15=2.9.0-1 >/dev/null 2>apt.log || { cat apt.log; exit 1; }
 for package in ./*.deb; do dpkg -x "$package" tree; done)
export LD_LIBRARY_PATH="$dir/tree/usr/lib/x86_64-linux-gnu"
cat >"$dir/machine.xml" <<'XML'
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE topology SYSTEM "hwloc2.dtd">
<topology version="2.0">
  <object type="Machine" os_index="0" cpuset="0x1" complete_cpuset="0x1" allowed_cpuset="0x1" nodeset="0x1" complete_nodeset="0x1" allowed_nodeset="0x1" gp_index="1">
    <object type="NUMANode" os_index="0" cpuset="0x1" complete_cpuset="0x1" nodeset="0x1" complete_nodeset="0x1" gp_index="2" local_memory="1073741824"/>
    <object type="PU" os_index="0" cpuset="0x1" complete_cpuset="0x1" nodeset="0x1" complete_nodeset="0x1" gp_index="3"/>
    <object type="Bridge" gp_index="4" bridge_type="0-1" depth="0" bridge_pci="0000:[00-01]">
      <object type="Bridge" gp_index="5" bridge_type="1-1" depth="1" bridge_pci="0000:[01-01]" pci_busid="0000:00:01.0" pci_type="0604 [8086:2030] [0000:0000] 04" pci_link_speed="15.753846">
        <object type="PCIDev" gp_index="6" pci_busid="0000:01:00.0" pci_type="0302 [10de:20b0] [10de:0000] a1" pci_link_speed="15.753846"/>
      </object>
    </object>
    <object type="Bridge" gp_index="7" bridge_type="0-1" depth="0" bridge_pci="10000:[00-01]">
      <object type="Bridge" gp_index="8" bridge_type="1-1" depth="1" bridge_pci="10000:[01-01]" pci_busid="10000:00:02.0" pci_type="0604 [8086:2032] [0000:0000] 04" pci_link_speed="3.938462">
        <object type="PCIDev" gp_index="9" pci_busid="10000:01:00.0" pci_type="0108 [144d:a808] [144d:a801] 00" pci_link_speed="3.938462">
          <object type="OSDev" gp_index="10" name="nvme0n1" osdev_type="0"/>
        </object>
      </object>
    </object>
  </object>
</topology>
XML
status=0
"$dir/tree/usr/bin/lstopo-no-graphics" -i "$dir/machine.xml" --whole-io --of xml >"$dir/out.xml" 2>"$dir/log" || status=$?
warning=$(grep -o 'Ignoring PCI device.*' "$dir/log" || true)
python3 - "$dir" >"$dir/seen" <<'PY'
import sys, xml.etree.ElementTree as tree
def look(name):
    root = tree.parse(f"{sys.argv[1]}/{name}").getroot()
    parent = {child: node for node in root.iter() for child in node}
    disk = next(node for node in root.iter() if node.get("name") == "nvme0n1")
    return [n.get("pci_busid") for n in root.iter() if n.get("pci_busid")], parent[disk].get("type")
(before, above), (after, now) = look("machine.xml"), look("out.xml")
print("bridges and functions in:", *before)
print("bridges and functions out:", *after)
print(f"parent of nvme0n1 in: {above}, out: {now}")
PY
echo "exit status $status, warning: $warning" >>"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: the disk loses its bus"
