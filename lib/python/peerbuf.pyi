"""Share one buffer between a GPU, an NVMe disk and an RDMA card through dma-buf.

What holds something is closed by `with` or `close()`, and raises ValueError after that. Calls that wait let other
threads run. An access is "r", "w" or "rw". A length of None is all that follows. Timeouts are in seconds; None waits
for ever. A descriptor is a number, or an object with fileno(), and stays the caller's.
"""

from os import PathLike
from typing import Literal, Protocol, Self, TypeAlias, TypedDict, final

__all__ = [
    "__version__",
    "Buffer",
    "Channel",
    "Domain",
    "Error",
    "File",
    "Listener",
    "Mapping",
    "Publisher",
    "Registration",
    "Subscriber",
    "bar",
    "heap",
    "import_fd",
    "memfd",
    "udmabuf",
]

_Access: TypeAlias = Literal["r", "w", "rw"]
_Path: TypeAlias = Literal["peer-to-peer", "shared-host-memory", "staged-copy"]

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

_Descriptor: TypeAlias = int | _HasFileno

__version__: str

class Error(Exception):
    """A failure; its text says what was tried, on what, and what came back."""

    code: str
    """Which kind, for programs, such as "out-of-range". docs/c.md has the same codes."""
    evidence: str
    """The call that failed, its object and its answer; empty where none did."""
    remedy: str
    """What to do."""
    errno: int
    """The number that a system call returned; 0 where none failed."""

class _Reason(TypedDict):
    path: _Path
    """A better path that was not possible."""
    code: str
    """Why, for programs: docs/reasons has a page for each."""
    evidence: str

class _Report(TypedDict):
    """What a transfer did, or would do."""

    path: _Path
    bytes: int
    """Bytes moved; 0 in a plan. Fewer than asked for only where a file that was read ended."""
    host_bytes: int
    """Of these, the bytes that were in system memory on their way."""
    reasons: list[_Reason]

class _Event(TypedDict):
    """What happened to a publisher."""

    event: Literal["joined", "left", "cut-off", "not-offered", "not-accepted", "other"]
    subscriber: str | None
    peer: tuple[int | None, int, int] | None
    """Of one that joined: its process, user and group."""
    buffers: list[str]
    """Those that it had not given back, or was not offered."""
    why: str | None

@final
class Buffer:
    """Memory that devices, files and processes can use."""

    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """Who made it: "memfd", "udmabuf", "heap", "bar", "drm", "vfio", "v4l2", "provider" or "other"."""
    @property
    def device(self) -> str | None:
        """The PCI address of the device that has the memory, where that is known."""
    @property
    def writable(self) -> bool: ...
    @property
    def generation(self) -> int | None:
        """The number of a borrowed buffer's generation; None for others."""
    def dmabuf(self) -> int | None:
        """Another descriptor of its dma-buf, which the caller closes; None where it has none."""
    def memfd(self) -> int | None:
        """The same of the memfd with its bytes."""
    def for_engine(self, engine: str) -> Literal["memfd", "dmabuf"]:
        """The handle that the engine takes: "ucx", "nixl", "libfabric" (its providers tcp, shm, sockets and udp) or
        "verbs". "memfd": the address of a mapping of it, as map() makes one."""
    def map(self, access: _Access = "r", offset: int = 0, length: int | None = None) -> Mapping: ...
    def wanted_back(self, timeout: float = 0.0) -> bool:
        """Waits up to so many seconds until the publisher of a borrowed buffer wants it back."""
    def close(self) -> None:
        """Ends it. A borrowed one goes back when its mappings are closed, too."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class Mapping:
    """The bytes of a buffer. Within `with` it has Python's buffer protocol: memoryview(mapping),
    numpy.frombuffer(mapping, ...). At the end of `with` devices see what was written. Other processes and devices may
    change the bytes at any time. Memory of a device that goes away raises SIGBUS, which ends the process."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...
    def close(self) -> None:
        """Ends it. BufferError while a memoryview or an array still uses the bytes."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class File:
    """An existing file or block device."""

    def __new__(cls, path: str | PathLike[str], access: _Access = "r") -> Self: ...
    @staticmethod
    def from_descriptor(fd: _Descriptor, name: str = "a file") -> File:
        """Takes an open file. `name` is for messages."""
    @property
    def size(self) -> int: ...
    def read_into(
        self, buffer: Buffer, file_offset: int = 0, offset: int = 0, length: int | None = None
    ) -> _Report:
        """Fills a range of the buffer with the file's bytes from `file_offset` on, or with as many as there are."""
    def write_from(
        self, buffer: Buffer, file_offset: int = 0, offset: int = 0, length: int | None = None
    ) -> _Report:
        """Writes a range of the buffer to the file."""
    def plan(
        self,
        buffer: Buffer,
        into: Literal["buffer", "file"],
        file_offset: int = 0,
        offset: int = 0,
        length: int | None = None,
    ) -> _Report:
        """Chooses the path of a transfer. The first time for a pair of devices it proves the path, and nobody
        else may use the range meanwhile."""
    def sync(self) -> None:
        """Makes what was written durable (fdatasync)."""
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class Channel:
    """One end of a connection that buffers travel over: docs/wire.md."""

    def __new__(cls, socket: _Descriptor) -> Self:
        """Takes a connected socket (AF_UNIX, SOCK_SEQPACKET), of which it keeps a descriptor of its own."""
    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        """Both ends, for a process and its child."""
    @staticmethod
    def connect(path: str | PathLike[str]) -> Channel:
        """Connects to a Listener."""
    @property
    def peer(self) -> tuple[int | None, int, int]:
        """Process, user and group of the other end, as the kernel vouches for them. None for a process of another PID
        namespace."""
    def fileno(self) -> int:
        """The channel's descriptor, to wait for with select. It stays the channel's."""
    def send(self, buffer: Buffer, offset: int = 0, length: int | None = None) -> None:
        """Hands over a range of a buffer. The other end gets access to the whole buffer."""
    def receive(self, timeout: float | None = None) -> tuple[Buffer, int, int]:
        """Waits for a range to be handed over: the buffer, and the range's offset and length."""
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class Listener:
    """A place in the filesystem where other processes connect: those of this user, unless the file's mode is
    changed."""

    def __new__(cls, path: str | PathLike[str]) -> Self: ...
    def fileno(self) -> int:
        """The listener's descriptor, to wait for with select. It stays the listener's."""
    def accept(self) -> Channel:
        """Waits for a process to connect. Signals do not interrupt it: wait with select first."""
    def close(self) -> None:
        """Ends it, and removes its socket file."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class Subscriber:
    """A connection to a publisher, which lends buffers and moves them."""

    def __new__(cls, path: str | PathLike[str]) -> Self: ...
    @staticmethod
    def from_descriptor(socket: _Descriptor) -> Subscriber:
        """Subscribes over a connected socket (AF_UNIX, SOCK_SEQPACKET), or over a Channel's."""
    def borrow(self, name: str, timeout: float | None = None) -> Buffer:
        """Waits until a buffer of this name is offered. The publisher gets it back when it and its mappings are
        closed, and waits for that when it moves the buffer."""
    def names(self) -> list[str]:
        """What is offered now."""
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class Publisher:
    """Lends buffers to processes of this user and of root. They are served during its calls only: call next_event
    often, in a thread of its own if need be."""

    def __new__(cls, path: str | PathLike[str] | None = None) -> Self:
        """Listens at `path`; None where all subscribers are added."""
    def add(self, channel: Channel) -> None:
        """Adds a subscriber that is connected already, and takes the channel."""
    def publish(self, name: str, buffer: Buffer) -> None:
        """Offers the buffer, and takes it: `buffer` is closed. Close its mappings before it moves."""
    def migrate(self, name: str, buffer: Buffer, timeout: float) -> tuple[int, int, int]:
        """Moves the bytes to another buffer of the same size, which it takes, and lends that from now on. Who does not
        give the old one back in time is cut off. Returns the generation's number, how many subscribers gave the old
        one back, and how many were lost."""
    def withdraw(self, name: str, timeout: float) -> None:
        """Takes it back from everybody, and lends it no more."""
    def next_event(self, timeout: float | None = None) -> _Event | None:
        """Serves subscribers until something happens, or the time is over."""
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class Domain:
    """A protection domain that the program has."""

    def __new__(cls, pd: int) -> Self:
        """Takes the address of a `struct ibv_pd` of libibverbs.so.1, from ctypes or another binding. The address must
        be right: a wrong one crashes the process. The program deallocates it after this and its registrations."""
    def register(
        self,
        buffer: Buffer,
        offset: int = 0,
        length: int | None = None,
        remote: _Access | None = None,
    ) -> Registration:
        """Gives the card a range of a buffer, in the best way that works. `remote` is what the other end may do."""
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class Registration:
    """A range of a buffer that a card may use, and what work requests name."""

    @property
    def address(self) -> int:
        """The address of the range's first byte, here and at the other end."""
    @property
    def length(self) -> int: ...
    @property
    def lkey(self) -> int: ...
    @property
    def rkey(self) -> int: ...
    @property
    def rung(self) -> Literal["dma-buf-by-library", "dma-buf-by-kernel", "shared-memory", "staged"]:
        """How the card was given the buffer."""
    @property
    def mr(self) -> int | None:
        """The address of the `struct ibv_mr`, which stays the registration's; None where libibverbs did not make
        it."""
    def plan(self) -> _Report:
        """The path, and the reason against each better one."""
    def refresh(self, offset: int, length: int) -> int:
        """Brings a range of the buffer to where the card reads it, before work that reads it. Only "staged" copies:
        how many bytes."""
    def deliver(self, offset: int, length: int) -> int:
        """Brings a range from where the card has written it to the buffer, after that work."""
    def close(self) -> None:
        """Takes the range from the card. Work in flight fails."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

def memfd(name: str, length: int) -> Buffer:
    """Memory without a dma-buf: for files and processes, on any machine."""

def udmabuf(name: str, length: int) -> Buffer:
    """A dma-buf of memory (/dev/udmabuf), a multiple of the page size."""

def heap(heap: str, name: str, length: int) -> Buffer:
    """A dma-buf of a dma-heap, such as "system"."""

def bar(device: str, bar: int, length: int, offset: int | None = None, access: _Access = "rw") -> Buffer:
    """Part of a BAR of a PCI device, by peerbuf.ko; anywhere in it without an offset. `device` is its PCI address, or
    the path of its node."""

def import_fd(fd: _Descriptor) -> Buffer:
    """Takes a dma-buf, or a memfd with F_SEAL_SHRINK, that another library made."""
