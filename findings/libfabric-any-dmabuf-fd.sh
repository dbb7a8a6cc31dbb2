#!/usr/bin/env bash
# Software:  libfabric 2.5 as mpich 5.0.2 (PyPI) carries it; headers of libfabric-dev 1.17.0-3 (Debian 12).
# Behaviour: fi_mr_regattr() with FI_MR_DMABUF and descriptor 99999, which is not open, succeeds in every provider
#            that runs without hardware; none looks at the descriptor. `sockets` also registers ordinary memory as
#            that of CUDA, ROCr, Level Zero, Neuron and Habana devices; the others answer ENOSYS to those.
#            So a registration there is no proof that a dma-buf works.
# Seen:
#   libfabric 2.5
#   tcp: dma-buf of descriptor 99999 yes, device interfaces 1 to 5: no no no no no
#   shm: dma-buf of descriptor 99999 yes, device interfaces 1 to 5: no no no no no
#   sockets: dma-buf of descriptor 99999 yes, device interfaces 1 to 5: yes yes yes yes yes
# Needs: python3 with venv, pip, cc, apt-get with Debian 12's main suite, dpkg. No root, no RDMA device.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps mpich==5.0.2
(cd "$dir" && apt-get download -q libfabric-dev=1.17.0-3 >/dev/null 2>apt.log || { cat apt.log; exit 1; }
 dpkg -x libfabric-dev*.deb tree)
cat >"$dir/try.c" <<'C'
#include <stdio.h>
#include <string.h>
#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
/* Both came after 1.17, in 1.20's rdma/fi_domain.h. */
#define MR_DMABUF (1ULL << 40)
struct dmabuf { int fd; uint64_t offset; size_t len; void *base; };

static char memory[4096];

static const char *takes(struct fid_domain *domain, int iface, const void *range, uint64_t flags)
{
	struct fi_mr_attr attr = { .mr_iov = range, .iov_count = 1, .iface = iface, .requested_key = 100 + iface,
				   .access = FI_SEND | FI_RECV | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE };
	struct fid_mr *mr = NULL;

	if (fi_mr_regattr(domain, &attr, flags, &mr))
		return "no";
	fi_close(&mr->fid);
	return "yes";
}

int main(void)
{
	static const char *const providers[] = { "tcp", "shm", "sockets" };
	struct iovec range = { memory, sizeof memory };
	struct dmabuf buffer = { 99999, 0, sizeof memory, memory };

	printf("libfabric %u.%u\n", FI_MAJOR(fi_version()), FI_MINOR(fi_version()));
	for (int i = 0; i < 3; i++) {
		struct fi_info *hints = fi_allocinfo(), *info = NULL;
		struct fid_fabric *fabric;
		struct fid_domain *domain;

		hints->mode = ~0ULL;
		hints->caps = FI_MSG | FI_RMA;
		hints->ep_attr->type = FI_EP_RDM;
		hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
		hints->fabric_attr->prov_name = strdup(providers[i]);
		if (fi_getinfo(FI_VERSION(1, 20), NULL, NULL, 0, hints, &info) ||
		    fi_fabric(info->fabric_attr, &fabric, NULL) || fi_domain(fabric, info, &domain, NULL)) {
			printf("%s: not there\n", providers[i]);
			continue;
		}
		printf("%s: dma-buf of descriptor 99999 %s, device interfaces 1 to 5:", providers[i],
		       takes(domain, 0, &buffer, MR_DMABUF));
		for (int iface = 1; iface <= 5; iface++)
			printf(" %s", takes(domain, iface, &range, 0));
		puts("");
	}
	return 0;
}
C
library=$(find "$dir/venv" -name libfabric.so.1 -printf '%h\n' -quit)
cc -o "$dir/try" "$dir/try.c" -I"$dir/tree/usr/include" -L"$library" -l:libfabric.so.1 -Wl,--allow-shlib-undefined
LD_LIBRARY_PATH="$library" "$dir/try" >"$dir/seen" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: any number is a dma-buf"
