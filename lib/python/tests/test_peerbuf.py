"""What any machine can do. Run by lib/python/test, with the wheel and numpy."""

import fcntl
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
import unittest

import numpy
import peerbuf


class Case(unittest.TestCase):
    def refused(self, code, call, *arguments, **named):
        with self.assertRaises(peerbuf.Error) as raised:
            call(*arguments, **named)
        self.assertEqual(raised.exception.code, code)
        self.assertTrue(str(raised.exception) and raised.exception.remedy)
        return raised.exception


class Buffers(Case):
    def test_a_file_becomes_an_array_and_a_file_again(self):
        with tempfile.TemporaryDirectory() as directory:
            source, target = (os.path.join(directory, name) for name in ("from", "to"))
            values = numpy.arange(10_000, dtype="<f4")
            values.tofile(source)
            open(target, "wb").close()
            with peerbuf.memfd("weights", values.nbytes) as weights, peerbuf.File(source) as file:
                plan = file.plan(weights, into="buffer")
                report = file.read_into(weights)
                self.assertEqual((plan["bytes"], report["bytes"]), (0, values.nbytes))
                self.assertEqual(report["path"], plan["path"])
                self.assertEqual(report["reasons"][0]["code"], "not-device-memory")
                self.assertIn("memfd", report["reasons"][0]["evidence"])
                with weights.map("rw") as mapping:
                    array = numpy.frombuffer(mapping, dtype="<f4")
                    self.assertTrue((array == values).all())
                    array *= 2
                    del array
                with peerbuf.File(target, "rw") as file:
                    self.assertEqual(file.write_from(weights)["bytes"], values.nbytes)
                    file.sync()
            self.assertTrue((numpy.fromfile(target, dtype="<f4") == 2 * values).all())

    def test_bytes_are_used_within_the_access_and_by_its_right(self):
        with peerbuf.memfd("x", 4096) as buffer:
            mapping = buffer.map("r")
            with self.assertRaises(BufferError):
                memoryview(mapping)
            with mapping:
                view = memoryview(mapping)
                self.assertTrue(view.readonly)
                with self.assertRaises(BufferError):
                    mapping.close()
                view.release()
            with self.assertRaises(ValueError):
                len(mapping)
            with buffer.map("w", 4000) as mapping:
                self.assertEqual(len(mapping), 96)
                memoryview(mapping)[95] = 7
            with buffer.map("r", 4095, 1) as mapping:
                self.assertEqual(bytes(mapping), b"\x07")

    def test_the_bytes_stay_while_an_array_has_them(self):
        buffer = peerbuf.memfd("x", 4096)
        mapping = buffer.map("rw")
        mapping.__enter__()
        array = numpy.frombuffer(mapping, dtype="u1")
        buffer.close()
        del buffer, mapping
        array[:] = 3
        self.assertEqual(int(array.sum()), 3 * 4096)

    def test_what_another_library_made_is_taken_or_refused_with_the_reason(self):
        unsealed = os.memfd_create("theirs", os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, 8192)
        self.refused("not-sealed", peerbuf.import_fd, unsealed)
        fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.pwrite(unsealed, b"bytes", 4096)
        with peerbuf.import_fd(unsealed) as buffer, buffer.map("r", 4096, 5) as mapping:
            self.assertEqual((buffer.name, buffer.kind, buffer.device), ("theirs", "memfd", None))
            self.assertEqual(bytes(mapping), b"bytes")
            again = buffer.memfd()
            self.assertIsNone(buffer.dmabuf())
            self.assertEqual([buffer.for_engine(engine) for engine in ("ucx", "verbs")], ["memfd"] * 2)
            self.refused("unsuitable", buffer.for_engine, "no such engine")
        self.assertEqual(os.fstat(again).st_ino, os.fstat(unsealed).st_ino)
        os.close(again)
        os.close(unsealed)
        with open(__file__) as file:
            self.refused("not-a-dmabuf", peerbuf.import_fd, file)
        error = self.refused("system", peerbuf.import_fd, 99_999)
        self.assertEqual((error.errno, "99999" in error.evidence), (9, True))

    def test_a_failure_says_code_evidence_and_remedy(self):
        error = self.refused("unavailable", peerbuf.heap, "no such heap", "x", 4096)
        self.assertEqual(error.errno, 2)
        self.assertIn("open", error.evidence)
        with peerbuf.memfd("x", 4096) as buffer:
            for arguments in ("rw", 4096, 1), ("r", 2**64 - 1, 2):
                self.refused("out-of-range", buffer.map, *arguments)
            with self.assertRaises(ValueError):
                buffer.map("x")
            with self.assertRaises(OverflowError):
                buffer.map("r", -1)
            for fd in -1, "1", None:
                with self.assertRaises((ValueError, TypeError)):
                    peerbuf.import_fd(fd)
        with self.assertRaises(ValueError):
            buffer.size
        self.assertEqual(repr(buffer), "<peerbuf.Buffer, closed>")
        self.refused("system", peerbuf.File, "/no/such/file")
        self.refused("not-a-file", peerbuf.File, "/dev/null")
        # A null pointer; or first of all no libibverbs.
        with self.assertRaises(peerbuf.Error) as raised:
            peerbuf.Domain(0)
        self.assertIn(raised.exception.code, ("argument", "unavailable"))


def receives_and_answers(socket_):
    with peerbuf.Channel(socket_) as channel:
        buffer, offset, length = channel.receive(timeout=60)
        with buffer.map("rw", offset, length) as mapping:
            view = memoryview(mapping)
            view[:] = bytes(view)[::-1]
            view.release()
        channel.send(buffer, offset, length)


class Sharing(Case):
    def test_another_process_has_the_same_bytes(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = multiprocessing.get_context("spawn").Process(target=receives_and_answers, args=(theirs,))
        child.start()
        theirs.close()
        with ours, peerbuf.Channel(ours) as channel, peerbuf.memfd("weights", 8192) as weights:
            with weights.map("w", 4096, 3) as mapping:
                memoryview(mapping)[:] = b"abc"
            self.assertEqual(channel.peer[1], os.getuid())
            channel.send(weights, 4096, 3)
            buffer, offset, length = channel.receive(timeout=60)
            self.assertEqual((buffer.size, buffer.name, offset, length), (8192, "weights", 4096, 3))
            with weights.map("r", 4096, 3) as mapping:
                self.assertEqual(bytes(mapping), b"cba")
            child.join()
            self.assertEqual(child.exitcode, 0)
            self.refused("peer-gone", channel.receive)

    def test_a_wait_ends_in_time_and_by_a_signal(self):
        ours, theirs = peerbuf.Channel.pair()
        with ours, theirs:
            self.refused("timed-out", ours.receive, timeout=0)
            before = time.monotonic()
            self.refused("timed-out", ours.receive, timeout=0.3)
            self.assertGreaterEqual(time.monotonic() - before, 0.3)

            class Interrupted(Exception):
                pass

            def interrupt(*_):
                raise Interrupted

            old = signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with self.assertRaises(Interrupted):
                ours.receive()
            signal.signal(signal.SIGALRM, old)

    def test_a_path_is_listened_at_and_removed(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "socket")
            with peerbuf.Listener(path) as listener, peerbuf.Channel.connect(path) as ours:
                with listener.accept() as theirs, peerbuf.memfd("x", 4096) as buffer:
                    ours.send(buffer)
                    self.assertEqual(theirs.receive(timeout=60)[1:], (0, 4096))
            self.assertEqual(os.listdir(directory), [])
        datagrams, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with datagrams, other:
            self.refused("wrong-socket", peerbuf.Channel, datagrams)

    def test_what_is_lent_moves_with_its_bytes(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "socket")
            with peerbuf.Publisher(path) as publisher:
                weights = peerbuf.memfd("weights", 8192)
                with weights.map("w") as mapping:
                    memoryview(mapping)[0] = 1
                publisher.publish("weights", weights)
                with self.assertRaises(ValueError):
                    weights.size
                self.refused("other", publisher.publish, "weights", peerbuf.memfd("again", 8192))
                events, over = [], threading.Event()

                def serve():
                    while not over.is_set():
                        events.append(publisher.next_event(timeout=0.05))

                thread = threading.Thread(target=serve)
                thread.start()
                try:
                    self.borrow_while_it_moves(path, publisher)
                finally:
                    over.set()
                    thread.join()
                joined = [event for event in events if event and event["event"] == "joined"]
                self.assertEqual([event["peer"][0] for event in joined], [os.getpid()])
                publisher.withdraw("weights", 10)
                with self.assertRaises(KeyError):
                    publisher.withdraw("weights", 10)

    def borrow_while_it_moves(self, path, publisher):
        with peerbuf.Subscriber(path) as subscriber:
            with subscriber.borrow("weights", timeout=60) as borrowed:
                self.assertEqual((borrowed.generation, subscriber.names()), (1, ["weights"]))
                self.assertFalse(borrowed.wanted_back())
                with borrowed.map("rw") as mapping:
                    memoryview(mapping)[1] = 2
                with peerbuf.Channel.pair()[0] as channel, self.assertRaises(ValueError):
                    channel.send(borrowed)
            with self.assertRaises(ValueError):
                publisher.migrate("weights", peerbuf.memfd("short", 4096), 10)
            moved = publisher.migrate("weights", peerbuf.memfd("next", 8192), 60)
            self.assertEqual(moved, (2, 1, 0))
            with subscriber.borrow("weights", timeout=60) as borrowed, borrowed.map("r") as mapping:
                self.assertEqual((borrowed.generation, bytes(mapping)[:2]), (2, b"\x01\x02"))
            self.refused("timed-out", subscriber.borrow, "nothing of the kind", timeout=0.2)

    def test_a_channel_goes_to_a_publisher(self):
        ours, theirs = peerbuf.Channel.pair()
        with peerbuf.Publisher() as publisher, theirs:
            publisher.publish("x", peerbuf.memfd("x", 4096))
            publisher.add(ours)
            with self.assertRaises(ValueError):
                ours.fileno()
            with peerbuf.Subscriber.from_descriptor(theirs) as subscriber:
                self.assertEqual(publisher.next_event(timeout=60)["event"], "joined")
                self.assertEqual(subscriber.borrow("x", timeout=60).size, 4096)


if __name__ == "__main__":
    unittest.main()
