#!/usr/bin/env bash
# Software:  safetensors 0.8.0 (PyPI) with numpy 2.3.5; safetensors 0.7.0 beside it.
# Behaviour: safetensors.numpy.save() of an array that is not C-contiguous (a transpose, a column slice) raises
#            nothing and writes the array's memory from its first byte on, under the shape of the view: other
#            numbers than the array holds. 0.7.0 wrote the array's values. The documentation asks for contiguous
#            tensors; nothing checks it.
# Seen:
#   0.7.0 transpose    asked [[0, 3], [1, 4], [2, 5]]  file [[0, 3], [1, 4], [2, 5]]
#   0.7.0 even columns asked [[0, 2], [4, 6]]  file [[0, 2], [4, 6]]
#   0.8.0 transpose    asked [[0, 3], [1, 4], [2, 5]]  file [[0, 1], [2, 3], [4, 5]]
#   0.8.0 even columns asked [[0, 2], [4, 6]]  file [[0, 1], [2, 3]]
# Needs: python3 with venv, pip. No root.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cat >"$dir/try.py" <<'PY'
import numpy as np, safetensors
from safetensors.numpy import save, load
six, eight = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(8, dtype=np.int32).reshape(2, 4)
for name, array in (("transpose   ", six.T), ("even columns", eight[:, ::2])):
    print(safetensors.__version__, name, "asked", array.tolist(), " file", load(save({"x": array}))["x"].tolist())
PY
for version in 0.7.0 0.8.0; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -q --disable-pip-version-check safetensors==$version numpy==2.3.5
    "$dir/$version/bin/python" "$dir/try.py" >>"$dir/seen"
done
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: safetensors 0.8.0 writes memory order"
