# Compiles the kernel's own tests of udmabuf and of the dma-buf heaps into /lab/out, from the source
# in /lab/source.tar.xz, unchanged. Runs in the distribution tree.
set -eu
cd /tmp
tests=tools/testing/selftests
tar -xf /lab/source.tar.xz --wildcards --strip-components=1 \
    "*/$tests/*.h" "*/$tests/drivers/dma-buf/*" "*/$tests/dmabuf-heaps/*"
for test in drivers/dma-buf/udmabuf dmabuf-heaps/dmabuf-heap; do
    gcc-14 -O2 -I$tests -o "/lab/out/selftest-${test##*/}" "$tests/$test.c"
done
