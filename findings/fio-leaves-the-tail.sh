#!/usr/bin/env bash
# Software:  fio 3.33 (Debian 12, 3.33-3).
# Behaviour: fio works in whole blocks only. Reading a file of 100,000 bytes once with --bs=64k reads 65,536 bytes and
#            reports no error; its rate and time are those of two thirds of the file. A loader that reads the
#            file whole looks a third slower in the same comparison. A file smaller than a block is an error.
# Seen:
#   --bs=64k: 65536 of 100000 bytes, error 0
#   --bs=4k: 98304 of 100000 bytes, error 0
#   --bs=128k: status 1, fio: blocksize is larger than data set range
# Needs: apt-get with Debian 12's main suite, dpkg, python3. No root.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
(cd "$dir" && apt-get download -q fio=3.33-3 $(apt-get -s install --no-install-recommends fio=3.33-3 |
    sed -n 's/^Inst \([^ ]*\) .*(\([^ ]*\).*/\1=\2/p' | grep -v '^fio=') >/dev/null 2>apt.log || { cat apt.log; exit 1; }
 for package in ./*.deb; do dpkg -x "$package" tree; done)
export LD_LIBRARY_PATH="$dir/tree/usr/lib/x86_64-linux-gnu:$dir/tree/lib/x86_64-linux-gnu:$dir/tree/usr/lib/x86_64-linux-gnu/ceph"
head -c 100000 /dev/urandom >"$dir/file"
for block in 64k 4k 128k; do
    status=0
    (cd "$dir" && tree/usr/bin/fio --name=all --filename=file --rw=read --bs=$block --ioengine=psync \
        --output-format=json --output=result) >"$dir/log" 2>&1 || status=$?
    if [ $status = 0 ]; then
        python3 - "$block" "$dir/result" <<'PY'
import json, sys
job = json.load(open(sys.argv[2]))["jobs"][0]
print(f"--bs={sys.argv[1]}: {job['read']['io_bytes']} of 100000 bytes, error {job['error']}")
PY
    else
        echo "--bs=$block: status $status, $(head -n1 "$dir/log")"
    fi
done >"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: the tail is not read"
