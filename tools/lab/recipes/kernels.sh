# Lists, in /lab/out/versions, the kernel packages that the suites offer whole (image, headers and
# source), 'linux-image-' cut off, the newest last. Runs in the distribution tree.
set -eu
cd /tmp
apt-get -q update
apt-cache search --names-only '^linux-image-[0-9].*-amd64$' | cut -d' ' -f1 | cut -d- -f3- |
    grep -v -e cloud -e -rt- -e unsigned -e dbg >names
# Older ones are still named in the lists, with a part or two missing.
apt-cache madison $(sed 's/^/linux-headers-/' names) 2>/dev/null | awk '{ print $1, $3 }' >headers || true
apt-cache madison $(cut -d. -f1,2 names | sort -u | sed 's/^/linux-source-/') 2>/dev/null | awk '{ print $3 }' >sources || true
awk 'NR == FNR { source[$1]; next } $2 in source { sub(/^linux-headers-/, "", $1); print $1 }' sources headers |
    sort -Vu >/lab/out/versions
[ -s /lab/out/versions ]
