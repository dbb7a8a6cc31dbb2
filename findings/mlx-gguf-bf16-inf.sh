#!/usr/bin/env bash
# Software:  mlx and mlx-cpu 0.32.4, gguf 0.19.0, safetensors 0.8.0 (PyPI), numpy 2.4.6, ml_dtypes 0.5.4, on the CPU.
# Behaviour: mlx.core.load() of a GGUF file turns a tensor of type BF16 into float16, which has the same size and a
#            smaller range: numbers from 65520 on become infinite, those below 3e-8 zero, without an error or a
#            warning. The same numbers in a safetensors file are loaded as bfloat16. The other types have their own
#            (F16 to float16, F32 to float32).
# Seen:
#   numbers: 1e-08 1 65536 1e+05 3e+38
#   gguf reader: BF16 1.0012e-08 1 65536 99840 3.0041e+38
#   mlx, safetensors: mlx.core.bfloat16 1.0012e-08 1 65536 99840 3.0041e+38
#   mlx, gguf: mlx.core.float16 0 1 inf inf inf
# Needs: python3 3.11 to 3.14 with venv, pip. No root, no GPU.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --only-binary :all: --no-deps mlx==0.32.4 mlx-cpu==0.32.4 \
    gguf==0.19.0 safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.5.4 tqdm==4.70.1 pyyaml==6.0.4 requests==2.34.2
cat >"$dir/try.py" <<'PY'
import sys
import gguf, ml_dtypes, mlx.core, numpy as np
from safetensors.numpy import save_file
names = [f"{sys.argv[1]}/model.{kind}" for kind in ("safetensors", "gguf")]
numbers = np.array([1e-8, 1, 65536, 1e5, 3e38], np.float32)
bf16 = numbers.astype(ml_dtypes.bfloat16)
save_file({"x": bf16}, names[0])
writer = gguf.GGUFWriter(names[1], "llama")
writer.add_tensor("x", bf16.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
def text(values): return " ".join(f"{float(value):.5g}" for value in values)
print("numbers:", text(numbers))
tensor = gguf.GGUFReader(names[1]).tensors[0]
print("gguf reader:", tensor.tensor_type.name, text(gguf.dequantize(tensor.data, tensor.tensor_type)))
for name in names:
    array = mlx.core.load(name)["x"]
    print(f"mlx, {name.rpartition('.')[2]}:", array.dtype, text(array.astype(mlx.core.float32).tolist()))
PY
"$dir/venv/bin/python" "$dir/try.py" "$dir" >"$dir/seen" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: BF16 of GGUF becomes float16"
