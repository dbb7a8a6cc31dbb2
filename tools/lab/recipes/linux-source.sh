# Makes, in /lab/out/linux, the tree that modules for the kernel package $1 are built against, with
# kmod/prepare-tree, which is /lab/out/prepare-tree here. Runs in the distribution tree.
set -eu
cd /lab/out
apt-get -q update
mkdir linux
mount --bind /lab/out/linux /lab/linux
sh prepare-tree --packages /lab/out/packages /lab/linux "$1"
umount /lab/linux
# The tarball stays: the debug kernel and the kernel's own tests are made of it.
mv packages/usr/src/linux-source-*.tar.xz linux-source.tar.xz
keep_for_modules linux
rm -r packages prepare-tree
