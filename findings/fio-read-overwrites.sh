#!/usr/bin/env bash
# Software:  fio 3.33 (Debian 12, 3.33-3).
# Behaviour: a job that only reads (--rw=read or randread), with a --size above that of an existing file, first lays
#            the file out anew: its bytes are replaced, it grows to the size, status 0. A file of 1,000,000 bytes and
#            --size=1M are enough. With --allow_file_create=0 fio removes the file, then says that it may not create
#            one. With --overwrite=1 the bytes are lost, too. --readonly refuses and leaves the file alone;
#            --create_on_open=1 reads what is there.
# Seen:
#   --size=1M: status 0, 1048576 bytes, content replaced
#   --size=1M --overwrite=1: status 0, 1048576 bytes, content replaced
#   --size=1M --allow_file_create=0: status 1, file gone
#   --size=1M --readonly: status 1, 1000000 bytes, content kept
#   --size=1M --create_on_open=1: status 1, 1000000 bytes, content kept
#   no size: status 0, 1000000 bytes, content kept
# Needs: apt-get with Debian 12's main suite, dpkg. No root.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
(cd "$dir" && apt-get download -q fio=3.33-3 $(apt-get -s install --no-install-recommends fio=3.33-3 |
    sed -n 's/^Inst \([^ ]*\) .*(\([^ ]*\).*/\1=\2/p' | grep -v '^fio=') >/dev/null 2>apt.log || { cat apt.log; exit 1; }
 for package in ./*.deb; do dpkg -x "$package" tree; done)
export LD_LIBRARY_PATH="$dir/tree/usr/lib/x86_64-linux-gnu:$dir/tree/lib/x86_64-linux-gnu:$dir/tree/usr/lib/x86_64-linux-gnu/ceph"
head -c 1000000 /dev/urandom >"$dir/model"
for options in "--size=1M" "--size=1M --overwrite=1" "--size=1M --allow_file_create=0" "--size=1M --readonly" \
    "--size=1M --create_on_open=1" ""; do
    cp "$dir/model" "$dir/copy"
    status=0
    # shellcheck disable=SC2086
    (cd "$dir" && tree/usr/bin/fio --name=all --filename=copy --rw=read --bs=4k --ioengine=psync $options) \
        >"$dir/log" 2>&1 || status=$?
    if [ ! -e "$dir/copy" ]; then
        after="file gone"
    elif cmp -s -n 1000000 "$dir/model" "$dir/copy"; then
        after="$(stat -c %s "$dir/copy") bytes, content kept"
    else
        after="$(stat -c %s "$dir/copy") bytes, content replaced"
    fi
    echo "${options:-no size}: status $status, $after"
done >"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: a job that reads overwrites the file"
