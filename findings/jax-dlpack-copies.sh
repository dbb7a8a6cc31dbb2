#!/usr/bin/env bash
# Software:  jax and jaxlib 0.10.2 (PyPI), numpy 2.3.5, on the CPU.
# Behaviour: jax.dlpack.from_dlpack() shares the memory only if its address is a multiple of 64; else it copies and
#            says nothing. A tensor in a mapped model file starts where the file puts it (safetensors aligns to 8
#            bytes, GGUF to 32), so of one file some arrays see later writes of the buffer, others do not.
#            jax.numpy.from_dlpack(copy=False) refuses instead. Memory mapped read-only is not taken at all.
# Seen:
#   address 0 past a multiple of 64: shared
#   address 8 past a multiple of 64: copied
#   address 16 past a multiple of 64: copied
#   address 32 past a multiple of 64: copied
#   address 8, copy=False: ValueError
#   read-only mapping: BufferError
# Needs: python3 3.11 to 3.14 with venv, pip. No root, no GPU.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --only-binary :all: jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$dir/try.py" <<'PY'
import mmap, os
import jax, jax.numpy, numpy as np
fd = os.memfd_create("model")
os.ftruncate(fd, 65536)
writable = np.frombuffer(mmap.mmap(fd, 65536), np.uint8)
readonly = np.frombuffer(mmap.mmap(fd, 65536, prot=mmap.PROT_READ), np.uint8)
for offset in (0, 8, 16, 32):
    view = writable[offset:offset + 256].view(np.float32)
    view[0] = 1
    array = jax.dlpack.from_dlpack(view)
    array.block_until_ready()
    shared = array.unsafe_buffer_pointer() == view.ctypes.data
    view[0] = 2
    assert (float(array[0]) == 2) == shared
    print(f"address {offset} past a multiple of 64:", "shared" if shared else "copied")
for name, call in (("address 8, copy=False", lambda: jax.numpy.from_dlpack(writable[8:264].view(np.float32), copy=False)),
                   ("read-only mapping", lambda: jax.dlpack.from_dlpack(readonly))):
    try:
        call()
        print(f"{name}: taken")
    except Exception as error:
        print(f"{name}: {type(error).__name__}")
PY
JAX_PLATFORMS=cpu "$dir/venv/bin/python" "$dir/try.py" >"$dir/seen" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: shared by luck"
