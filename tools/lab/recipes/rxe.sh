# Builds soft-RoCE with the lab's patches: /lab/out/rdma_rxe.ko, for the kernel whose build tree is
# /lab/linux, from the source in /lab/source.tar.xz. Runs in the distribution tree. /lab/patches holds
# the patches; the arguments are make's.
set -eu
mkdir /tmp/rxe
cd /tmp/rxe
tar -xf /lab/source.tar.xz --wildcards --strip-components=1 '*/drivers/infiniband/sw/rxe/*'
for patch in /lab/patches/*.patch; do
    # A hunk that does not fit leaves a .rej file and a message, and ends the recipe.
    busybox patch -p1 <"$patch"
done
make -s -j"$(nproc)" -C /lab/linux M=/tmp/rxe/drivers/infiniband/sw/rxe CONFIG_RDMA_RXE=m "$@" modules
strip --strip-debug -o /lab/out/rdma_rxe.ko drivers/infiniband/sw/rxe/rdma_rxe.ko
