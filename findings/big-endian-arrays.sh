#!/usr/bin/env bash
# Software:  pyarrow 26.0.1, onnxruntime 1.32.0, tensorstore 0.1.86, tritonclient 2.73.0 (PyPI), numpy 2.4.6;
#            safetensors 0.8.0 beside them.
# Behaviour: an array whose dtype has the other byte order (as FITS, GRIB, netCDF 3 and many detectors' files give it)
#            is taken by pyarrow.Tensor, by onnxruntime's OrtValue, by tensorstore.array and into Triton's shared memory
#            as if its bytes were in the machine's order: other numbers, no error. In the same libraries
#            pyarrow.array() refuses it, and TensorStore.write() writes its values, as safetensors does.
# Seen:
#   array: >f4 [0.0, 1.0, 2.0, 3.0]
#   pyarrow.Tensor: float32 [0.0, 4.6006e-41, 8.9683e-44, 2.3049e-41]
#   onnxruntime.OrtValue: float32 [0.0, 4.6006e-41, 8.9683e-44, 2.3049e-41]
#   tensorstore.array: float32 [0.0, 4.6006e-41, 8.9683e-44, 2.3049e-41]
#   tritonclient, shared memory: float32 [0.0, 4.6006e-41, 8.9683e-44, 2.3049e-41]
#   TensorStore.write: float32 [0.0, 1.0, 2.0, 3.0]
#   pyarrow.array: ArrowNotImplementedError Byte-swapped arrays not supported
#   safetensors: float32 [0.0, 1.0, 2.0, 3.0]
# Needs: python3 3.11 to 3.13 with venv, pip, /dev/shm, on a little-endian machine. No root, no GPU.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --only-binary :all: --no-deps onnxruntime==1.32.0 \
    pyarrow==26.0.1 numpy==2.4.6 safetensors==0.8.0 tensorstore==0.1.86 ml_dtypes==0.5.4 tritonclient==2.73.0 \
    python-rapidjson==1.25
cat >"$dir/try.py" <<'PY'
import os
import numpy as np, onnxruntime, pyarrow, tensorstore
import tritonclient.utils.shared_memory as triton
from safetensors.numpy import load, save
array = np.arange(4, dtype=">f4")
def say(name, call):
    try:
        got = call()
        print(f"{name}: {got.dtype.str if got is array else got.dtype}", [float(f"{x:.5g}") for x in got])
    except Exception as error:
        print(f"{name}: {type(error).__name__} {error}")
say("array", lambda: array)
say("pyarrow.Tensor", lambda: pyarrow.Tensor.from_numpy(array).to_numpy())
say("onnxruntime.OrtValue", lambda: onnxruntime.OrtValue.ortvalue_from_numpy(array).numpy())
say("tensorstore.array", lambda: tensorstore.array(array).read().result())
region = triton.create_shared_memory_region("region", f"/big-endian-{os.getpid()}", 4096)
triton.set_shared_memory_region(region, [array])
say("tritonclient, shared memory", lambda: triton.get_contents_as_numpy(region, np.float32, [4]))
triton.destroy_shared_memory_region(region)
store = tensorstore.open({"driver": "zarr3", "kvstore": "memory://", "metadata": {"shape": [4], "data_type": "float32"}},
                         create=True).result()
store.write(array).result()
say("TensorStore.write", lambda: store.read().result())
say("pyarrow.array", lambda: pyarrow.array(array).to_numpy())
say("safetensors", lambda: load(save({"x": array}))["x"])
PY
"$dir/venv/bin/python" "$dir/try.py" >"$dir/seen" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: bytes in the wrong order, no error"
