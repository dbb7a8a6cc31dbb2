# Puts rdma-core's Python tests, unchanged, into /lab/out/rdma-core-tests.tar: those of the source of the
# libibverbs that is installed. Runs in the distribution tree.
set -eu
cd /tmp
version=$(dpkg-query -W -f '${source:Version}' libibverbs1)
sed -n 's/^deb /deb-src /p' /etc/apt/sources.list >sources.list
set -- -q -o APT::Sandbox::User=root -o Dir::Etc::SourceList=/tmp/sources.list -o Dir::Etc::SourceParts=-
apt-get "$@" update
# The archive's own, without what Debian adds to it: that are no tests.
apt-get "$@" source --download-only --tar-only "rdma-core=$version"
tar -xf rdma-core_*.orig.tar.* --wildcards --strip-components=1 '*/tests/*.py'
tar -cf /lab/out/rdma-core-tests.tar tests
