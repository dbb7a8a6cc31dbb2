# Lists, in /lab/out/versions, the kernel packages that the suites offer, 'linux-image-' cut off, the newest last;
# 'image only' follows where they have no headers and source of the same version. Runs in the distribution tree.
set -eu
cd /tmp
apt-get -q update
names() { apt-cache search --names-only "^linux-$1-[0-9].*-amd64\$" | cut -d' ' -f1 | cut -d- -f3-; }
names image | grep -v -e cloud -e -rt- -e unsigned -e dbg >names
# Since 6.19 the image is a metapackage over these two; of older releases the suites keep the first alone.
names binary >binaries
names modules >modules
apt-cache madison $(sed 's/^/linux-headers-/' names) 2>/dev/null | awk '{ print $1, $3 }' >headers || true
apt-cache madison $(cut -d. -f1,2 names | sort -u | sed 's/^/linux-source-/') 2>/dev/null | awk '{ print $3 }' >sources || true
awk 'FILENAME == "sources" { source[$1]; next }
    FILENAME == "headers" { if ($2 in source) { sub(/^linux-headers-/, "", $1); whole[$1] }; next }
    FILENAME == "modules" { modules[$1]; next }
    FILENAME == "binaries" { if (!($1 in modules)) part[$1]; next }
    !($1 in part) { print $1 ($1 in whole ? "" : " image only") }' sources headers modules binaries names |
    sort -Vu >/lab/out/versions
[ -s /lab/out/versions ]
