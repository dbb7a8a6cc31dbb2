# Makes the image of the NVMe disk's first namespace: ext4, 512 MiB, sparse.
set -eu
truncate -s 512M /lab/out/nvme.ext4
mkfs.ext4 -q -L peerbuf-nvme -E lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0 /lab/out/nvme.ext4
