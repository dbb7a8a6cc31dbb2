#!/usr/bin/env bash
# Software:  pyhwloc 3.0.1 (PyPI; its libhwloc says 3.0.0a1-git) and hwloc 2.9.0 (Debian 12).
# Behaviour: the XML of hwloc 3 keeps the attribute `osdev_type` and changes its meaning: version 2 writes a kind
#            (0 block, 1 GPU, 2 network, 3 OpenFabrics), version 3 a set of bits (1 storage, 4 GPU, 16 network, 48
#            network and OpenFabrics). Read by the old rule, a disk is a GPU. `pci_type` got a fifth field. hwloc
#            2.9.0 refuses the new file.
# Seen:
#   version 2: nvme0n1 0, card0 1, ib0 2, mlx5_0 3, pci_type 0108 [144d:a808] [144d:a801] 00
#   version 3: nvme0n1 1, card0 4, ib0 16, mlx5_0 48, pci_type 0108 [144d:a808] [144d:a801] 00 00
#   hwloc 2.9.0: cannot import XML version 3.0 > 2
# Needs: python3, pip, apt-get with Debian 12's main suite, dpkg. No root, no PCI device.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" download -q --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.12 \
    -d "$dir" pyhwloc==3.0.1
python3 -m zipfile -e "$dir"/pyhwloc-*.whl "$dir/wheel"
(cd "$dir" && apt-get download -q hwloc-nox=2.9.0-1 libhwloc15=2.9.0-1 >/dev/null 2>apt.log || { cat apt.log; exit 1; }
 for package in ./*.deb; do dpkg -x "$package" tree; done)
cat >"$dir/2.xml" <<'XML'
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE topology SYSTEM "hwloc2.dtd">
<topology version="2.0">
  <object type="Machine" os_index="0" cpuset="0x1" complete_cpuset="0x1" allowed_cpuset="0x1" nodeset="0x1" complete_nodeset="0x1" allowed_nodeset="0x1" gp_index="1">
    <object type="NUMANode" os_index="0" cpuset="0x1" complete_cpuset="0x1" nodeset="0x1" complete_nodeset="0x1" gp_index="2" local_memory="1073741824"/>
    <object type="PU" os_index="0" cpuset="0x1" complete_cpuset="0x1" nodeset="0x1" complete_nodeset="0x1" gp_index="3"/>
    <object type="Bridge" gp_index="4" bridge_type="0-1" depth="0" bridge_pci="0000:[00-01]">
      <object type="PCIDev" gp_index="5" pci_busid="0000:01:00.0" pci_type="0108 [144d:a808] [144d:a801] 00" pci_link_speed="3.938462">
        <object type="OSDev" gp_index="6" name="nvme0n1" osdev_type="0"/>
        <object type="OSDev" gp_index="7" name="card0" osdev_type="1"/>
        <object type="OSDev" gp_index="8" name="ib0" osdev_type="2"/>
        <object type="OSDev" gp_index="9" name="mlx5_0" osdev_type="3"/>
      </object>
    </object>
  </object>
</topology>
XML
cat >"$dir/try.py" <<'PY'
import ctypes as c, glob, sys, xml.etree.ElementTree as tree
folder = sys.argv[1]
hwloc = c.CDLL(glob.glob(f"{folder}/wheel/**/libhwloc.so*", recursive=True)[0])
topology = c.c_void_p()
KEEP_ALL = 0
assert hwloc.hwloc_topology_init(c.byref(topology)) == 0
assert hwloc.hwloc_topology_set_xml(topology, f"{folder}/2.xml".encode()) == 0
assert hwloc.hwloc_topology_set_io_types_filter(topology, KEEP_ALL) == 0
assert hwloc.hwloc_topology_load(topology) == 0
assert hwloc.hwloc_topology_export_xml(topology, f"{folder}/3.xml".encode(), c.c_ulong(0)) == 0
for version in (2, 3):
    nodes = list(tree.parse(f"{folder}/{version}.xml").getroot().iter())
    kinds = [f"{n.get('name')} {n.get('osdev_type')}" for n in nodes if n.get("osdev_type")]
    print(f"version {version}: {', '.join(kinds)}, pci_type", next(n.get("pci_type") for n in nodes if n.get("pci_type")))
PY
python3 "$dir/try.py" "$dir" >"$dir/seen" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
echo "hwloc 2.9.0: $(LD_LIBRARY_PATH="$dir/tree/usr/lib/x86_64-linux-gnu" "$dir/tree/usr/bin/lstopo-no-graphics" \
    -i "$dir/3.xml" 2>&1 | grep -o 'cannot import XML.*')" >>"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: a disk is a GPU by the old rule"
