# Makes, in /lab/out/linux, the tree that modules for the kernel package $1 are built against.
# Runs in the distribution tree. The distribution's headers package carries no Rust metadata, so
# the tree is prepared from the distribution's own source package with the kernel's own .config.
set -eu
V=$1
cd /lab/out
mkdir debs x

apt-get -q update
# The package's version in the archive, so that the source is this kernel's and not its successor's.
version=$(apt-cache madison "linux-headers-$V" | awk '{ print $3; exit }')
series=$(echo "$V" | cut -d. -f1,2)
# 40: not offered, or not any more. (apt's own failures are 100.)
[ -n "$version" ] || exit 40
apt-cache madison "linux-source-$series" | awk '{ print $3 }' | grep -qxF "$version" || exit 40
(cd debs && apt-get -q -o APT::Sandbox::User=root download \
    "linux-headers-$V=$version" "linux-source-$series=$version")
for deb in debs/*.deb; do dpkg-deb -x "$deb" x; done
rm -r debs
headers=x/usr/src/linux-headers-$V
# 41: this kernel cannot load Rust modules.
grep -q '^CONFIG_RUST=y' "$headers/.config" || exit 41

mv x/usr/src/linux-source-*.tar.xz linux-source.tar.xz
mkdir linux
mount --bind /lab/out/linux /lab/linux

# Of a hundred thousand files, those that a build of modules, its host tools and the Rust bindings read.
S='linux-source-*'
extract_for_modules() {
    tar -xf linux-source.tar.xz --strip-components=1 -C linux --wildcards \
        --exclude="$S/Documentation/*.rst" --exclude="$S/tools/testing/*" --exclude="$S/tools/perf/*" \
        "$S/Makefile" '*/Makefile*' '*/Kconfig*' '*/Kbuild*' "$S/arch/x86/*" "$S/certs/*" \
        "$S/drivers/android/*.h" "$S/drivers/base/*.h" "$S/drivers/gpu/*.h" "$S/include/*" "$S/init/*" \
        "$S/kernel/bounds.c" "$S/kernel/*.h" "$S/kernel/sched/rq-offsets.c" "$S/kernel/time/timeconst.bc" \
        "$S/lib/vdso/*" "$S/rust/*" "$S/scripts/*" "$S/tools/*" "$S/usr/*"
}
prepare() (
    cp "/lab/out/$headers/.config" /lab/linux/.config
    cd /lab/linux
    scripts/config --set-str MODULE_SIG_KEY "" --set-str SYSTEM_TRUSTED_KEYS ""
    version=$(make -s kernelversion)
    case $V in
        "$version"*) ;;
        *) echo "linux-source-$series is $version, which is not the source of $V"; exit 42 ;;
    esac
    # The tools that run here are used for minutes, so optimising them costs more than it gives.
    make -s -j"$(nproc)" CC=gcc-14 HOSTCC=gcc-14 HOSTCFLAGS=-O0 HOSTRUSTFLAGS=-Copt-level=0 \
        LOCALVERSION="${V#"$version"}" olddefconfig prepare modules_prepare
)
extract_for_modules
# Another kernel's build may read more than those.
prepare || {
    tar -xf linux-source.tar.xz --strip-components=1 -C linux
    prepare
}
cd /lab/linux
cp "/lab/out/$headers/Module.symvers" .
[ "$(cat include/config/kernel.release)" = "$V" ]
# With another configuration, the module's structures are not the kernel's.
theirs=/lab/out/$headers/.config
own="CONFIG_CC_VERSION_TEXT CONFIG_MODULE_SIG_KEY"
if ! config_took "$theirs" .config "$own" || ! config_took .config "$theirs" "$own"; then
    echo "the lab's tool chain does not reproduce the kernel's configuration (above)"
    exit 43
fi

cd /lab/out
umount /lab/linux
# The tarball stays: the debug kernel and the kernel's own tests are made of it.
keep_for_modules linux
rm -r x
