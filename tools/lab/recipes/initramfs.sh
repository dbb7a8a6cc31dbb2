# Makes /lab/out/initramfs for the kernel $1 in /lab/kernel. Runs in the distribution tree; /lab/init
# is the initramfs's first program.
set -eu
V=$1
cd /lab/out

# The initramfs holds the modules that every guest loads, with what they need, unpacked and in
# order of loading: under emulation, unpacking xz and reading modules.dep cost seconds. Their type
# information for BPF goes, and with it their signature: the kernel's checks of the two are three
# of the seven billion instructions of a boot. The code is the distribution's own.
mkdir -p ramfs/bin ramfs/dev ramfs/proc ramfs/sys ramfs/sysroot ramfs/lower ramfs/over ramfs/modules
cp /bin/busybox ramfs/bin/busybox
cp /lab/init ramfs/init
chmod 755 ramfs/init
list() {
    group=$1; shift
    for name in "$@"; do modprobe -d /lab/kernel -S "$V" --show-depends "$name" 2>/dev/null || true; done |
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
# Behind a virtio-iommu, devices wait for its driver.
list root virtio_iommu 9pnet_virtio 9p overlay
list disk nvme ext4
list net virtio_net ib_uverbs rdma_ucm rdma_rxe
(cd ramfs && find . | cpio --quiet -o -H newc) >initramfs
rm -r ramfs
