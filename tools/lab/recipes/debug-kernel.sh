# Builds the instrumented kernel of the lab's: in /lab/out its vmlinuz, lib/modules, release (the
# text that uname -r gives), and linux, the tree that modules for it are built against. Runs in the
# distribution tree. /lab/source.tar.xz is the distribution's source, /lab/config what is asked for
# beyond tinyconfig. With Rust, KASAN needs clang.
set -eu
cd /lab/out

# Headers of drivers that are not built, for the most part: more than half of the source.
tar -xf /lab/source.tar.xz \
    --exclude='*/Documentation/*.[a-z]*' --exclude='*/tools/testing/*' --exclude='*/tools/perf/*' \
    --exclude='*/drivers/gpu/drm/amd/*.[ch]' --exclude='*/drivers/gpu/drm/i915/*.[ch]' \
    --exclude='*/drivers/gpu/drm/nouveau/*.[ch]' --exclude='*/drivers/gpu/drm/xe/*.[ch]' \
    --exclude='*/drivers/net/ethernet/*.[ch]' --exclude='*/drivers/net/wireless/*.[ch]' \
    --exclude='*/arch/a*/*.[chS]' --exclude='*/arch/[b-w]*/*.[chS]' --exclude='*/arch/*.dts*' \
    --exclude='*/sound/*/*.[ch]'
mv linux-source-*/ linux
mount --bind /lab/out/linux /lab/linux
cd /lab/linux
make="make -s -j$(nproc) LLVM=1 LOCALVERSION=-peerbuf-debug"
$make tinyconfig
scripts/kconfig/merge_config.sh -m .config /lab/config >/dev/null
$make olddefconfig
# An option that one of the supported series does not know any more.
if ! config_took /lab/config .config CONFIG_PROC_SYSCTL; then
    echo "the lab's debug-kernel.config asks for what this source cannot give (above)"
    exit 43
fi
$make bzImage modules
$make INSTALL_MOD_PATH=/lab/out INSTALL_MOD_STRIP=1 modules_install
cp arch/x86/boot/bzImage /lab/out/vmlinuz
cp include/config/kernel.release /lab/out/release
rm -f /lab/out/lib/modules/*/build
cd /lab/out
umount /lab/linux
keep_for_modules linux
