"""Either end of peerbuf's share protocol, written from docs/wire.md alone.

`peer.py ROLE`, with a seqpacket socket as standard input. wire.rs runs it against the library."""
import array, fcntl, mmap, os, socket, struct, sys, time

HEADER, DESCRIPTION, NOTE = struct.Struct("=8sIIII"), struct.Struct("=4I3Q16s96s"), struct.Struct("=QQII")
ENTRY = struct.Struct("=QQII64s152s")
MAGIC, VERSION, LONGEST, MOST = b"peerbuf\0", 2, 24 + 253 * 240, 253
HAND_OVER, HELLO, OFFER, INVALIDATE, WITHDRAW, FAREWELL, ACCEPTED, RELEASED, LAST_OFFER = range(1, 10)
RECORDS = {HAND_OVER: DESCRIPTION, OFFER: ENTRY, LAST_OFFER: ENTRY}
MEMFD, NO_BAR, SYSTEM, READ_WRITE = 3, 0xFFFFFFFF, 2, 2
F_ADD_SEALS, F_GET_SEALS, F_SEAL_SHRINK = 1033, 1034, 2
peer = socket.socket(fileno=os.dup(0))


def send(message, records=(), descriptors=()):
    body = b"".join(records)
    header = HEADER.pack(MAGIC, VERSION, message, HEADER.size + len(body), len(records))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    peer.sendmsg([header + body], rights, socket.MSG_NOSIGNAL)


def receive():
    """Returns a message, its records and its descriptors; no message at the end of the connection."""
    data, control, flags, _ = peer.recvmsg(LONGEST, socket.CMSG_SPACE(4 * MOST), socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None, [], []
    descriptors = array.array("i")
    for level, kind, rights in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(rights)
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "cut short"
    magic, version, message, length, count = HEADER.unpack_from(data)
    record = RECORDS.get(message, NOTE)
    assert (magic, version, length) == (MAGIC, VERSION, len(data)) and length == HEADER.size + count * record.size
    return message, list(record.iter_unpack(data[HEADER.size:])), list(descriptors)


def text(field):
    return field.rstrip(b"\0").decode()


def take(description, descriptors, access=READ_WRITE):
    """Maps a description's buffer and closes its descriptors. Returns the map, the range, and the buffer's name."""
    which, kind, bar, placement, offset, length, size, device, name = DESCRIPTION.unpack(description)
    assert which in (1, 2, 3) and offset + length <= size
    mine = [descriptors.pop(0) for _ in range(2 if which == 3 else 1)]
    if which & 2:
        assert fcntl.fcntl(mine[-1], F_GET_SEALS) & F_SEAL_SHRINK and os.fstat(mine[-1]).st_size >= size
    mapping = mmap.mmap(mine[-1], size, prot=mmap.PROT_READ | (mmap.PROT_WRITE if access == READ_WRITE else 0))
    for descriptor in mine:
        os.close(descriptor)
    return mapping, slice(offset, offset + length), text(name)


def make(content):
    """Returns a memfd with these bytes, and its description."""
    memfd = os.memfd_create("python", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(memfd, content)
    fcntl.fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK)
    size = len(content)
    return memfd, DESCRIPTION.pack(2, MEMFD, NO_BAR, SYSTEM, 0, size, size, b"", b"from python")


def subscribe(greetings=1):
    """Adds 1 to the first byte of each writable generation, and prints each generation."""
    held, offers = {}, 0
    for _ in range(greetings):
        send(HELLO)
    while True:
        message, records, descriptors = receive()
        if message in (OFFER, LAST_OFFER):
            offers += 1
            for identity, generation, access, _, name, description in records:
                mapping, _, _ = take(description, descriptors, access)
                held[identity] = generation, mapping
                print(text(name), generation, access, len(mapping), mapping[0], flush=True)
                if access == READ_WRITE:
                    mapping[0] += 1
            if message == LAST_OFFER:
                send(ACCEPTED, [NOTE.pack(offers, 0, 0, 0)])
        elif message in (INVALIDATE, WITHDRAW):
            for identity, generation, limit, _ in records:
                assert held[identity][0] == generation and limit > 0
                held.pop(identity)[1].close()
            send(RELEASED, [NOTE.pack(identity, generation, 0, 0) for identity, generation, _, _ in records])
        else:
            print("farewell", records[0][2]) if message == FAREWELL else print("gone")
            return


def publish():
    """Lends a buffer, moves its bytes to a second generation, and withdraws that."""
    content = b"first"
    assert receive() == (HELLO, [], [])
    for generation, back in (1, INVALIDATE), (2, WITHDRAW):
        memfd, description = make(content.ljust(4096, b"\0"))
        entry = ENTRY.pack(7, generation, READ_WRITE, 0, b"weights", description)
        send(LAST_OFFER, [entry], [memfd])
        assert receive() == (ACCEPTED, [(generation, 0, 0, 0)], [])
        while os.pread(memfd, len(content), 0) == content:  # until the subscriber has written
            time.sleep(0.001)
        send(back, [NOTE.pack(7, generation, 20_000, 0)])
        assert receive() == (RELEASED, [(7, generation, 0, 0)], [])
        content = os.pread(memfd, 5, 0)
        os.close(memfd)
    print(content.decode())


def hand_over():
    """Sends a buffer, receives a buffer, and prints its range."""
    memfd, description = make(b"from python".ljust(8192, b"\0"))
    send(HAND_OVER, [description], [memfd])
    message, [record], descriptors = receive()
    mapping, where, name = take(DESCRIPTION.pack(*record), descriptors)
    print(name, message, where.start, where.stop, text(mapping[where]))


if __name__ == "__main__":
    roles = {"subscribe": subscribe, "greet twice": lambda: subscribe(2), "publish": publish, "hand over": hand_over}
    roles[sys.argv[1]]()
