#!/usr/bin/env bash
# Software:  safetensors 0.8.0 and fastsafetensors 0.5.0 (PyPI), numpy 2.3.5.
# Behaviour: the two readers accept different files. fastsafetensors refuses a header that lists an empty tensor
#            after its non-empty neighbour at the same offset (it sorts by the first offset only); safetensors
#            takes it. fastsafetensors takes bytes after the last tensor; safetensors refuses them. Both take a
#            header of odd length, so 4-byte numbers may start at an odd offset of the file.
# Seen:
#   empty tensor listed first: safetensors yes, fastsafetensors yes, numbers start at 122
#   empty tensor listed last: safetensors yes, fastsafetensors no, numbers start at 122
#   4 bytes after the last tensor: safetensors no, fastsafetensors yes, numbers start at 65
#   header of odd length: safetensors yes, fastsafetensors yes, numbers start at 67
# Needs: python3 3.11 to 3.14 with venv, pip. No root, no GPU.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps \
    safetensors==0.8.0 fastsafetensors==0.5.0 numpy==2.3.5 typing_extensions==4.15.0
cat >"$dir/try.py" <<'PY'
import json, struct, sys
from safetensors.numpy import load_file
from fastsafetensors.common import SafeTensorsMetadata

class Sizes:  # what the parser asks of a framework: torch and paddle are 3 GB
    def get_device_ptr_align(self): return 16
    def get_dtype_size(self, dtype): return {"F32": 4}[dtype.value]

def entry(begin, end):
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}

def accepts(reader):
    try: reader()
    except Exception: return "no"
    return "yes"

full, empty = entry(0, 8), entry(0, 0)
for name, header, tail, spaces in (
    ("empty tensor listed first", {"empty": empty, "full": full}, b"", 0),
    ("empty tensor listed last", {"full": full, "empty": empty}, b"", 0),
    ("4 bytes after the last tensor", {"full": full}, b"tail", 0),
    ("header of odd length", {"full": full}, b"", 2),
):
    text = json.dumps(header, separators=(",", ":")).encode() + b" " * spaces
    path = sys.argv[1]
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<ff", 1, 2) + tail)
    print(f"{name}: safetensors {accepts(lambda: load_file(path))}, fastsafetensors "
          f"{accepts(lambda: SafeTensorsMetadata.from_file(path, Sizes()))}, numbers start at {8 + len(text)}")
PY
"$dir/venv/bin/python" "$dir/try.py" "$dir/model.safetensors" >"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: the readers disagree"
