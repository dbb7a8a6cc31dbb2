# Fetches kernel package $1 and makes of it, in /lab/out: vmlinuz, lib/modules/$1 and initramfs.
# Runs in the distribution tree. /lab/init is the initramfs's first program.
set -eu
V=$1
cd /lab/out
mkdir debs image ramfs

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
depmod -b /lab/out "$V" 2>&1 | grep -v 'could not open modules\.' || true

# The initramfs holds the modules that every guest loads, with what they need, unpacked and in
# order of loading: under emulation, unpacking xz and reading modules.dep cost seconds. Their type
# information for BPF goes, and with it their signature: the kernel's checks of the two are three
# of the seven billion instructions of a boot. The code is the distribution's own.
mkdir -p ramfs/bin ramfs/dev ramfs/proc ramfs/sys ramfs/root ramfs/lower ramfs/over ramfs/modules
cp /bin/busybox ramfs/bin/busybox
cp /lab/init ramfs/init
chmod 755 ramfs/init
list() {
    group=$1; shift
    for name in "$@"; do modprobe -d /lab/out -S "$V" --show-depends "$name" 2>/dev/null || true; done |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }' |
        while read -r path; do
            name=$(basename "$path"); name=${name%.xz}; name=${name%.zst}
            [ -e "ramfs/modules/$name" ] && continue
            case $path in
                *.xz) xz -dc "$path" >"ramfs/modules/$name" ;;
                *.zst) zstd -q -dc "$path" >"ramfs/modules/$name" ;;
                *) cp "$path" "ramfs/modules/$name" ;;
            esac
            objcopy -R .BTF -R .BTF.base "ramfs/modules/$name"
            echo "$name" >>"ramfs/modules/$group"
        done
    touch "ramfs/modules/$group"
}
list root 9pnet_virtio 9p overlay
list disk nvme ext4
list net virtio_net ib_uverbs rdma_ucm rdma_rxe
(cd ramfs && find . | cpio --quiet -o -H newc) >initramfs
rm -r ramfs
