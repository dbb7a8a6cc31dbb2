# Fetches kernel package $1 and makes of it, in /lab/out: vmlinuz (unpacked) and lib/modules/$1. Runs in the
# distribution tree.
set -eu
V=$1
cd /lab/out
mkdir debs image

apt-get -q update
# 40: not offered, or not any more. (apt's own failures are 100.)
apt-cache show --no-all-versions "linux-image-$V" >/dev/null 2>&1 || exit 40
packages=linux-image-$V
# The image was one package once, and is a metapackage over these two since 7.2.
for p in "linux-binary-$V" "linux-modules-$V"; do
    if apt-cache show --no-all-versions "$p" >/dev/null 2>&1; then packages="$packages $p"; fi
done
(cd debs && apt-get -q -o APT::Sandbox::User=root download $packages)
for deb in debs/*.deb; do dpkg-deb -x "$deb" image; done
rm -r debs

mkdir -p lib/modules
for d in image/usr/lib/modules image/lib/modules; do
    if [ -d "$d/$V" ]; then mv "$d/$V" lib/modules/; break; fi
done
if [ -e "lib/modules/$V/vmlinuz" ]; then
    mv "lib/modules/$V/vmlinuz" vmlinuz
else
    mv "image/boot/vmlinuz-$V" vmlinuz
fi
rm -r image
# Unpacked here, once: an emulated processor spends a fifth of a boot on it. The ELF file inside boots by
# itself (PVH); a kernel packed in another way than zstd stays as it is.
magic=$(printf '\050\265\057\375')
for at in $(LC_ALL=C grep -abo -e "$magic" vmlinuz | cut -d: -f1); do
    tail -c "+$((at + 1))" vmlinuz | zstd -qdc >vmlinux 2>/dev/null || true # what follows it is no zstd
    if [ "$(head -c 4 vmlinux)" = "$(printf '\177ELF')" ]; then mv vmlinux vmlinuz; break; fi
done
rm -f vmlinux
depmod -b /lab/out "$V" 2>&1 | grep -v 'could not open modules\.' || true
