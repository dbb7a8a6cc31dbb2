"""With real exporters, a disk and a card: run in the lab's guest by tests/lab/tests/python.rs."""

import ctypes
import os
import socket
import subprocess
import sys
import unittest

import peerbuf

SIZE = 1 << 20
DISK = "/mnt/nvme"


def largest_bar():
    """The device that peerbuf.ko has a node of, and its BAR: those with the most memory."""
    found = []
    for device in os.listdir("/dev/peerbuf"):
        if ":" not in device:
            continue
        with open(f"/sys/bus/pci/devices/{device}/resource") as resources:
            for bar, line in enumerate(resources.read().splitlines()[:6]):
                first, last, _flags = (int(number, 16) for number in line.split())
                found.append((last - first, device, bar))
    return max(found)[1:]


def whole(buffer):
    with buffer.map("r") as mapping:
        return bytes(mapping)


class Exporters(unittest.TestCase):
    def through(self, buffer, path, reason):
        """A file into the buffer, the buffer to another process, and from there to another file."""
        data = os.urandom(SIZE)
        source, target = f"{DISK}/python-from", f"{DISK}/python-to"
        with open(source, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        with buffer, peerbuf.File(source) as file:
            plan = file.plan(buffer, into="buffer")
            report = file.read_into(buffer)
            self.assertEqual((plan["path"], report["path"], report["bytes"]), (path, path, SIZE))
            self.assertEqual([why["code"] for why in report["reasons"]], reason)
            self.assertEqual(report["host_bytes"], 0 if path == "peer-to-peer" else SIZE)
            with buffer.map("r") as mapping:
                view = memoryview(mapping)
                self.assertTrue(view == data)
                view.release()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs, peerbuf.Channel(ours) as channel:
                command = [sys.executable, __file__, "receive", target, str(theirs.fileno())]
                child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
                channel.send(buffer, 4096)
                self.assertEqual(child.wait(), 0)
            # What the other process has written to the buffer before.
            with buffer.map("r", 4096, 7) as mapping:
                self.assertEqual(bytes(mapping), b"changed")
        with open(target, "rb") as file:
            self.assertTrue(file.read() == b"changed" + data[4096 + 7 :])
        for path in source, target:
            os.unlink(path)

    def test_a_udmabuf(self):
        buffer = peerbuf.udmabuf("python", SIZE)
        self.assertEqual((buffer.kind, buffer.device), ("udmabuf", None))
        self.through(buffer, "shared-host-memory", ["not-device-memory"])

    def test_a_bar(self):
        device, bar = largest_bar()
        buffer = peerbuf.bar(device, bar, SIZE)
        self.assertEqual((buffer.kind, buffer.device), ("bar", device))
        self.through(buffer, "peer-to-peer", [])
        with peerbuf.bar(f"/dev/peerbuf/{device}", bar, SIZE, access="r") as buffer:
            self.assertFalse(buffer.writable)
            with self.assertRaises(peerbuf.Error) as raised:
                buffer.map("rw")
            self.assertEqual(raised.exception.code, "access")

    def test_a_heap_taken_by_its_descriptor(self):
        with peerbuf.heap("system", "python", SIZE) as made:
            with made.map("w") as mapping:
                memoryview(mapping)[:5] = b"bytes"
            fd = made.dmabuf()
            try:
                with peerbuf.import_fd(fd) as taken:
                    self.assertEqual((taken.size, taken.kind), (SIZE, "heap"))
                    self.assertEqual(whole(taken)[:6], b"bytes\0")
            finally:
                os.close(fd)

    def test_a_registration_in_a_domain_of_the_programs_own(self):
        verbs = ctypes.CDLL("libibverbs.so.1", use_errno=True)
        for name in "ibv_get_device_list", "ibv_open_device", "ibv_alloc_pd":
            getattr(verbs, name).restype = ctypes.c_void_p
        devices = ctypes.cast(verbs.ibv_get_device_list(None), ctypes.POINTER(ctypes.c_void_p))
        context = verbs.ibv_open_device(ctypes.c_void_p(devices[0]))
        pd = verbs.ibv_alloc_pd(ctypes.c_void_p(context))
        self.assertTrue(pd)
        with peerbuf.Domain(pd) as domain, peerbuf.udmabuf("python", SIZE) as buffer:
            with domain.register(buffer, 4096, 8192, remote="rw") as registration:
                self.assertEqual(registration.length, 8192)
                self.assertTrue(registration.lkey and registration.rkey)
                # The stock soft-RoCE takes no dma-bufs.
                self.assertEqual(registration.rung, "shared-memory")
                self.assertEqual(registration.plan()["path"], "shared-host-memory")
                self.assertTrue(registration.mr)
            with self.assertRaises(ValueError):
                registration.lkey
            with self.assertRaises(peerbuf.Error) as raised:
                domain.register(buffer, SIZE, 1)
            self.assertEqual(raised.exception.code, "out-of-range")
        self.assertEqual(verbs.ibv_dealloc_pd(ctypes.c_void_p(pd)), 0)


def receive(target, fd):
    with peerbuf.Channel(fd) as channel:
        buffer, offset, length = channel.receive(timeout=600)
        with buffer.map("rw", offset, 7) as mapping:
            memoryview(mapping)[:] = b"changed"
        with peerbuf.File.from_descriptor(os.open(target, os.O_RDWR | os.O_CREAT, 0o600), target) as file:
            file.write_from(buffer, 0, offset, length)
            file.sync()


if __name__ == "__main__":
    if sys.argv[1:2] == ["receive"]:
        receive(sys.argv[2], int(sys.argv[3]))
    else:
        unittest.main(verbosity=2)
