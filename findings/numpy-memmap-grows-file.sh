#!/usr/bin/env bash
# Software:  numpy 2.4.6 (PyPI).
# Behaviour: numpy.memmap(mode="r+") with a shape larger than the file, and numpy.load(mmap_mode="r+") of a .npy file
#            whose end is not there yet (a transfer that goes on or stopped), make the file longer, without a word:
#            the rest reads as zeros and stays in the file. The modes "r" and "c" refuse. Once opened so, a file has the
#            size that a whole one has.
# Seen:
#   memmap r: ValueError, file of 1000 bytes
#   memmap c: ValueError, file of 1000 bytes
#   memmap r+: last number 0, file of 4000 bytes
#   load r: ValueError, file of 2000 bytes
#   load c: ValueError, file of 2000 bytes
#   load r+: last number 0, file of 8128 bytes
#   whole file: 8128 bytes
# Needs: python3 3.11 to 3.14 with venv, pip. No root.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --only-binary :all: numpy==2.4.6
cat >"$dir/try.py" <<'PY'
import os, sys
import numpy as np
raw, saved = f"{sys.argv[1]}/raw", f"{sys.argv[1]}/saved.npy"
def say(name, path, call):
    try:
        text = f"last number {call()[-1]}"
    except Exception as error:
        text = type(error).__name__
    print(f"{name}: {text}, file of {os.path.getsize(path)} bytes")
with open(raw, "wb") as file:
    file.write(b"\1" * 1000)
np.save(saved, np.arange(1, 1001))
whole = os.path.getsize(saved)
os.truncate(saved, 2000)
for mode in ("r", "c", "r+"):
    say(f"memmap {mode}", raw, lambda: np.memmap(raw, np.uint8, mode, shape=(4000,)))
for mode in ("r", "c", "r+"):
    say(f"load {mode}", saved, lambda: np.load(saved, mmap_mode=mode))
print(f"whole file: {whole} bytes")
PY
"$dir/venv/bin/python" "$dir/try.py" "$dir" >"$dir/seen" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: opening a short file makes it long"
