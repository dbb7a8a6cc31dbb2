#!/usr/bin/env bash
# Software:  KvikIO 26.10.0 (kvikio-cu12, libkvikio-cu12), numpy 2.4.6, on a machine without a CUDA driver.
# Behaviour: KvikIO's compatibility mode is the one for machines without GPUDirect Storage, and it takes host memory.
#            Without libcuda.so.1 it still imports, reports the mode as on, and opens files; the first read or write of
#            a numpy array fails. Opening for writing has emptied the file by then, and it stays empty.
# Seen:
#   compatibility mode on: True
#   read into numpy: RuntimeError, libcuda.so.1: cannot open shared object file: No such file or directory
#   opened for writing: 1000 bytes before, 0 after
#   write from numpy: RuntimeError, libcuda.so.1: cannot open shared object file: No such file or directory
#   after the failed write: 0 bytes
# Needs: python3 with venv, the package index (400 MB installed), no libcuda.so.1. No root, no GPU.
set -euo pipefail
if ldconfig -p | grep -q 'libcuda\.so\.1'; then echo "this machine has a CUDA driver: not run" >&2; exit 77; fi
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
# Without what it depends on but does not load here: compilers and linear algebra, 2.5 GB.
"$dir/venv/bin/pip" -q --disable-pip-version-check install --no-deps kvikio-cu12==26.10.0 libkvikio-cu12==26.10.0 \
    numpy==2.4.6 cupy-cuda12x==14.2.0 cuda-pathfinder==1.9.1 nvidia-cufile-cu12==1.14.1.1 rapids-logger==0.3.0 \
    packaging==26.4
cd "$dir"
cat >program.py <<'PY'
import os
import kvikio, kvikio.defaults, numpy

def told(what, call):
    try:
        print(f"{what}: {call()} bytes")
    except Exception as error:
        words = str(error).splitlines()[0]
        print(f"{what}: {type(error).__name__}, {words[words.index('libcuda'):]}")

mode = kvikio.defaults.get("compat_mode")
print("compatibility mode on:", mode == kvikio.CompatMode.ON)
array = numpy.zeros(1000, numpy.uint8)
array.tofile("source")
told("read into numpy", lambda: kvikio.CuFile("source", "r").read(array))
array.tofile("sink")
before = os.path.getsize("sink")
sink = kvikio.CuFile("sink", "w")
print(f"opened for writing: {before} bytes before, {os.path.getsize('sink')} after")
told("write from numpy", lambda: sink.write(array))
sink.close()
print(f"after the failed write: {os.path.getsize('sink')} bytes")
PY
KVIKIO_COMPAT_MODE=ON venv/bin/python program.py >seen
cd "$OLDPWD"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: host memory needs the CUDA driver"
