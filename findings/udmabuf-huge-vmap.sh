#!/usr/bin/env bash
# Software:  Linux 6.12.117 (Debian 13: linux-image-6.12.117+deb13-amd64), its udmabuf and its V4L2 test driver vivid.
# Behaviour: a udmabuf over a memfd of huge pages is mapped wrongly for a driver that copies by the processor: of a frame
#            of 150 pages, one page arrives. The program that has the memfd mapped sees that, no call fails, and
#            vivid reports the whole frame. With ordinary pages all arrive. 6.18 and later are right.
# Seen:
#   ordinary pages: bytesused 614400, pages of the buffer that changed 150
#   huge pages: bytesused 614400, pages of the buffer that changed 1
# Needs: apt-get with Debian's main suite, dpkg, gcc, xz; QEMU, else the distribution's is unpacked. No root, no device.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
kernel=6.12.117+deb13-amd64
# Debian 13's packages, whatever this machine is: from the place that this machine's own come from.
main=$(apt-get indextargets --format '$(SITE)' 'Label: Debian' | head -1)
mkdir -p "$dir/apt/state/lists/partial" "$dir/apt/cache/archives/partial"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $main trixie main" >"$dir/apt/sources.list"
apt=(apt-get -q -o "Dir::State=$dir/apt/state" -o "Dir::Cache=$dir/apt/cache" -o "Dir::Etc::SourceList=$dir/apt/sources.list"
     -o "Dir::Etc::SourceParts=-" -o "APT::Sandbox::User=$(id -un)")
(cd "$dir"
 { "${apt[@]}" update && "${apt[@]}" download "linux-image-$kernel" busybox-static; } >apt.log 2>&1 || { cat apt.log; exit 1; }
 for package in ./*.deb; do dpkg -x "$package" tree; done)
qemu=(qemu-system-x86_64)
if ! command -v qemu-system-x86_64 >/dev/null; then
    mkdir "$dir/qemu"
    (cd "$dir/qemu"
     apt-get download -q $(apt-get -s install --no-install-recommends qemu-system-x86 |
        sed -n 's/^Inst \([^ ]*\) (\([^ ]*\).*/\1=\2/p') >apt.log 2>&1 || { cat apt.log; exit 1; }
     for package in ./*.deb; do dpkg -x "$package" .; done)
    qemu=(env "LD_LIBRARY_PATH=$dir/qemu/usr/lib/x86_64-linux-gnu:$dir/qemu/lib/x86_64-linux-gnu"
          "$dir/qemu/usr/bin/qemu-system-x86_64" -L "$dir/qemu/usr/share/qemu" -L "$dir/qemu/usr/share/seabios")
fi
cat >"$dir/look.c" <<'C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/udmabuf.h>
#include <linux/videodev2.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (2UL << 20)

static int look(const char *what, unsigned flags)
{
	int memfd = memfd_create("pages", MFD_ALLOW_SEALING | flags);
	ftruncate(memfd, SIZE);
	fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK);
	unsigned char *bytes = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	memset(bytes, 0xa5, SIZE);
	struct udmabuf_create create = { .memfd = memfd, .size = SIZE };
	int buffer = ioctl(open("/dev/udmabuf", O_RDWR), UDMABUF_CREATE, &create);

	int video = open("/dev/video0", O_RDWR), on = V4L2_BUF_TYPE_VIDEO_CAPTURE;
	struct v4l2_format format = { .type = on };
	format.fmt.pix.width = 640;
	format.fmt.pix.height = 480;
	format.fmt.pix.pixelformat = V4L2_PIX_FMT_YUYV;
	struct v4l2_requestbuffers wanted = { .count = 1, .type = on, .memory = V4L2_MEMORY_DMABUF };
	struct v4l2_buffer frame = { .type = on, .memory = V4L2_MEMORY_DMABUF, .m.fd = buffer, .length = SIZE };
	if (ioctl(video, VIDIOC_S_FMT, &format) || ioctl(video, VIDIOC_REQBUFS, &wanted) ||
	    ioctl(video, VIDIOC_QBUF, &frame) || ioctl(video, VIDIOC_STREAMON, &on) ||
	    ioctl(video, VIDIOC_DQBUF, &frame)) {
		perror(what);
		return 1;
	}
	unsigned changed = 0;
	for (unsigned long at = 0; at < SIZE; at += 4096)
		for (unsigned byte = 0; byte < 4096; byte++)
			if (bytes[at + byte] != 0xa5) {
				changed++;
				break;
			}
	printf("SEEN %s: bytesused %u, pages of the buffer that changed %u\n", what, frame.bytesused, changed);
	close(video);
	return 0;
}

int main(void)
{
	return look("ordinary pages", 0) | look("huge pages", MFD_HUGETLB);
}
C
root="$dir/root"
modules=$(find "$dir/tree" -type d -path "*/lib/modules/$kernel")
mkdir -p "$root"/{bin,proc,sys,dev,lib/modules}
gcc -static -O1 -Wno-unused-result -o "$root/bin/look" "$dir/look.c"
cp "$(find "$dir/tree" -path '*/bin/busybox')" "$root/bin/busybox"
cp -r "$modules" "$root/lib/modules/"
find "$root/lib/modules" -name '*.ko.xz' -path '*/media/*' -exec xz -d {} +
find "$root/lib/modules" \( -name '*.ko.xz' -o -name 'modules.*' \) -delete
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
depmod
modprobe vivid
echo 4 >/proc/sys/vm/nr_hugepages
look 2>&1
poweroff -f
INIT
chmod +x "$root/init"; ln -s busybox "$root/bin/sh"
(cd "$root" && find . | bin/busybox cpio -o -H newc) | gzip -1 >"$dir/initramfs"
timeout 600 "${qemu[@]}" -accel tcg -m 1024 -nodefaults -display none -no-reboot -serial stdio -kernel "$dir"/tree/boot/vmlinuz-$kernel \
    -initrd "$dir/initramfs" -append "console=ttyS0 quiet panic=-1" </dev/null >"$dir/log" 2>&1 || { tail "$dir/log"; exit 1; }
tr -d '\r' <"$dir/log" | sed -n 's/^.*SEEN //p' >"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen" || { tail "$dir/log"; exit 1; }
echo "still so: one page of a frame arrives in huge pages"
