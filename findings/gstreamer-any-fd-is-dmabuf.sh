#!/usr/bin/env bash
# Software:  GStreamer 1.22.0 (Debian 12: libgstreamer1.0-0 1.22.0-2+deb12u1, libgstreamer-plugins-base1.0-0
#            1.22.0-3+deb12u6), GLib from the machine.
# Behaviour: the dma-buf allocator takes any descriptor. gst_is_dmabuf_memory() then says yes to a memfd, a plain file
#            and a pipe; mapping a memfd or a file succeeds without DMA_BUF_IOCTL_SYNC, whose error is ignored.
#            So 'is dma-buf' of a GstMemory tells how it was wrapped, not what the descriptor is.
# Seen:
#   memfd: gst_is_dmabuf_memory 1, gst_memory_map 1
#   file: gst_is_dmabuf_memory 1, gst_memory_map 1
#   pipe: gst_is_dmabuf_memory 1, gst_memory_map 0
# Needs: apt-get with Debian 12's main suite, dpkg, python3, libglib2.0-0. No root, no device.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
(cd "$dir" && apt-get download -q libgstreamer1.0-0=1.22.0-2+deb12u1 libgstreamer-plugins-base1.0-0=1.22.0-3+deb12u6 \
    $(apt-get -s install --no-install-recommends libgstreamer1.0-0 | sed -n 's/^Inst \(lib[^ ]*\) (\([^ ]*\).*/\1=\2/p' |
      grep -v '^libgst') >/dev/null 2>apt.log || { cat apt.log; exit 1; }
 for package in ./*.deb; do dpkg -x "$package" tree; done)
export LD_LIBRARY_PATH="$dir/tree/usr/lib/x86_64-linux-gnu:$dir/tree/lib/x86_64-linux-gnu" GST_DEBUG=0
export GST_REGISTRY_UPDATE=no GST_REGISTRY="$dir/registry" GST_PLUGIN_SYSTEM_PATH="$dir/none"
cat >"$dir/try.py" <<'PY'
import ctypes as c, os, sys
core, allocators = c.CDLL("libgstreamer-1.0.so.0"), c.CDLL("libgstallocators-1.0.so.0")
core.gst_init(None, None)
new, alloc = allocators.gst_dmabuf_allocator_new, allocators.gst_dmabuf_allocator_alloc
new.restype = alloc.restype = c.c_void_p
alloc.argtypes = [c.c_void_p, c.c_int, c.c_size_t]
allocators.gst_is_dmabuf_memory.argtypes = [c.c_void_p]
core.gst_memory_map.argtypes = [c.c_void_p, c.c_void_p, c.c_int]
memfd = os.memfd_create("plain memory")
os.ftruncate(memfd, 4096)
for name, fd in (("memfd", memfd), ("file", os.open(sys.argv[0], os.O_RDONLY)), ("pipe", os.pipe()[0])):
    memory = alloc(new(), fd, 4096)
    info = c.create_string_buffer(256)  # a GstMapInfo takes 104 bytes
    mapped = core.gst_memory_map(memory, info, 1)
    print(f"{name}: gst_is_dmabuf_memory {allocators.gst_is_dmabuf_memory(memory)}, gst_memory_map {mapped}")
PY
python3 "$dir/try.py" >"$dir/seen" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: any descriptor is a dma-buf"
