/* peerbuf for C. Made by cbindgen: change lib/c/src, then
   PEERBUF_WRITE_HEADER=1 cargo test -p peerbuf-c --test header */

#ifndef PEERBUF_H
#define PEERBUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Access: read.
#define PEERBUF_READ 1

// Access: write.
#define PEERBUF_WRITE 2

// Access: read and write.
#define PEERBUF_READ_WRITE 3

// As an offset in a BAR: any. As a length: up to the end.
#define PEERBUF_ANY UINT64_MAX

// A buffer's dma-buf.
#define PEERBUF_DMABUF 1

// The memfd with a buffer's bytes.
#define PEERBUF_MEMFD 2

// Path: the CPU copies through a bounce buffer.
#define PEERBUF_STAGED_COPY 1

// Path: both ends use the same pages of system memory.
#define PEERBUF_SHARED_HOST_MEMORY 2

// Path: the disk accesses the buffer's memory directly.
#define PEERBUF_PEER_TO_PEER 3

// Direction: from the file to the buffer.
#define PEERBUF_DISK_TO_BUFFER 1

// Direction: from the buffer to the file.
#define PEERBUF_BUFFER_TO_DISK 2

// The result of a function. The numbers never change; new ones may be added.
typedef enum {
  // Success.
  PEERBUF_CODE_OK = 0,
  // An invalid argument: a null pointer, a text that is not UTF-8, an unknown number.
  PEERBUF_CODE_ARGUMENT = 1,
  // Not a handle, a freed one, or one of another type.
  PEERBUF_CODE_HANDLE = 2,
  // Called in the wrong order: an access that has already begun, or has not begun.
  PEERBUF_CODE_ORDER = 3,
  // A bug in this library.
  PEERBUF_CODE_INTERNAL = 4,
  // A system call failed; `system_error` is its number.
  PEERBUF_CODE_SYSTEM = 5,
  // The machine lacks a required feature.
  PEERBUF_CODE_UNAVAILABLE = 6,
  // A length, an offset or a name that is not allowed; a buffer that an engine cannot take.
  PEERBUF_CODE_UNSUITABLE = 7,
  // The kernel module and this library are from different releases.
  PEERBUF_CODE_VERSION = 8,
  // The descriptor is not a dma-buf.
  PEERBUF_CODE_NOT_A_DMABUF = 9,
  // Another holder could shrink the memory.
  PEERBUF_CODE_NOT_SEALED = 10,
  // The bytes are not all inside the buffer.
  PEERBUF_CODE_OUT_OF_RANGE = 11,
  // A write to something read-only, or a read of something write-only.
  PEERBUF_CODE_ACCESS = 12,
  // A wait timed out.
  PEERBUF_CODE_TIMED_OUT = 13,
  // The object belongs to the process that this one was forked from.
  PEERBUF_CODE_INHERITED = 14,
  // The peer has closed the connection.
  PEERBUF_CODE_PEER_GONE = 15,
  // The peer violated the protocol.
  PEERBUF_CODE_MALFORMED = 16,
  // The publisher ended the connection.
  PEERBUF_CODE_CUT_OFF = 17,
  // The descriptor is not a unix socket of type SOCK_SEQPACKET.
  PEERBUF_CODE_WRONG_SOCKET = 18,
  // Neither a regular file nor a block device.
  PEERBUF_CODE_NOT_A_FILE = 19,
  // The file is open in an unsuitable mode.
  PEERBUF_CODE_FILE_MODE = 20,
  // The file accepted fewer bytes than were written.
  PEERBUF_CODE_SHORT_WRITE = 21,
  // The card could not register the buffer; the evidence lists each attempt.
  PEERBUF_CODE_NOT_REGISTERED = 22,
  // The buffer has changed since its registration.
  PEERBUF_CODE_STALE = 23,
  // Another failure; see the message.
  PEERBUF_CODE_OTHER = 24,
} peerbuf_code;

// Memory that devices, files and processes can share.
typedef struct peerbuf_buffer peerbuf_buffer;

// One end of a connection for buffers.
typedef struct peerbuf_channel peerbuf_channel;

// The program's protection domain.
typedef struct peerbuf_domain peerbuf_domain;

// An open file or block device.
typedef struct peerbuf_file peerbuf_file;

// A path at which other processes connect.
typedef struct peerbuf_listener peerbuf_listener;

// A buffer's bytes in this process.
typedef struct peerbuf_mapping peerbuf_mapping;

// A registered range of a buffer (memory region).
typedef struct peerbuf_registration peerbuf_registration;

// The result of a transfer, or of a plan.
typedef struct peerbuf_report peerbuf_report;

// A connection to a publisher.
typedef struct peerbuf_subscriber peerbuf_subscriber;

// The last failure of a thread. The texts are never null, and valid until the thread's next failure.
typedef struct {
  // The function's result; `PEERBUF_CODE_OK` if none has failed yet.
  peerbuf_code code;
  // The error number of the failed system call (errno); 0 if none failed.
  int system_error;
  // The operation, its object and its result.
  const char *message;
  // The failed call, its object and its error; empty if no call failed.
  const char *evidence;
  // The remedy.
  const char *remedy;
} peerbuf_error;

// Facts about a buffer.
typedef struct {
  // The size in bytes.
  uint64_t size;
  // The generation of a lent buffer; 0 for others.
  uint64_t generation;
  // The kind of exporter, as its number in docs/wire.md.
  uint32_t kind;
  // Whether it is writable.
  bool writable;
  // Whether it has a dma-buf.
  bool has_dmabuf;
  // Whether it has a memfd.
  bool has_memfd;
} peerbuf_buffer_info;

// The contents of a report. The texts are valid until the report is freed.
typedef struct {
  // The path: PEERBUF_STAGED_COPY, PEERBUF_SHARED_HOST_MEMORY or PEERBUF_PEER_TO_PEER.
  uint32_t path;
  // The path's name.
  const char *path_name;
  // The number of bytes moved; 0 in a plan. Fewer than requested only at the end of a file that was read.
  uint64_t bytes;
  // The number of those bytes that passed through system memory.
  uint64_t host_bytes;
  // All of it, with the reason against each better path, as JSON: {"path": ..., "bytes": ...,
  // "host_bytes": ..., "reasons": [{"path": ..., "code": ..., "evidence": ...}]}.
  const char *json;
} peerbuf_report_info;

// The peer's process when the connection was made, as reported by the kernel.
typedef struct {
  // Process ID; 0 for a process in another PID namespace.
  int32_t pid;
  // User ID.
  uint32_t uid;
  // Group ID.
  uint32_t gid;
} peerbuf_peer;

// The arguments of work requests.
typedef struct {
  // The address of the range's first byte, in local and remote requests.
  uint64_t address;
  // The length of the range in bytes.
  uint64_t length;
  // The local key.
  uint32_t lkey;
  // The remote key.
  uint32_t rkey;
  // The rung by which the card got the buffer: `dma-buf-by-library`, `dma-buf-by-kernel`, `shared-memory`
  // or `staged`.
  const char *rung;
  // The `struct ibv_mr *`, owned by the registration; null if libibverbs did not make it.
  void *mr;
} peerbuf_registration_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The calling thread's last failure. Never null; valid until the thread's next failure.
const peerbuf_error *peerbuf_last_error(void);

// The version of the library, such as `0.1.0`.
const char *peerbuf_version(void);

// Makes a buffer of `length` zero bytes of memory, without a dma-buf: for files and processes, on any
// machine. `name` is for diagnostics, here and below.
peerbuf_code peerbuf_export_memfd(const char *name,
                                  uint64_t length,
                                  peerbuf_buffer **buffer);

// Makes a dma-buf of `length` zero bytes of memory (/dev/udmabuf); `length` is a multiple of the page size.
peerbuf_code peerbuf_export_udmabuf(const char *name,
                                    uint64_t length,
                                    peerbuf_buffer **buffer);

// Makes a dma-buf of `length` zero bytes from the dma-heap `heap`, such as `system`; `length` is a multiple
// of the page size.
peerbuf_code peerbuf_export_heap(const char *heap,
                                 const char *name,
                                 uint64_t length,
                                 peerbuf_buffer **buffer);

// Exports part of a device's BAR with peerbuf.ko. `device` is a PCI address, such as `0000:01:00.0`, or the
// path of the device's node. `offset` may be PEERBUF_ANY. `access` is the access that the descriptor allows.
peerbuf_code peerbuf_export_bar(const char *device,
                                uint32_t bar,
                                uint64_t offset,
                                uint64_t length,
                                uint32_t access,
                                peerbuf_buffer **buffer);

// Takes a dma-buf, or a memfd with F_SEAL_SHRINK, that another library or program made. Facts that the
// kernel does not report stay unknown. The caller keeps the descriptor.
peerbuf_code peerbuf_import(int fd,
                            peerbuf_buffer **buffer);

// Returns facts about a buffer.
peerbuf_code peerbuf_buffer_get(const peerbuf_buffer *buffer, peerbuf_buffer_info *info);

// Returns a new descriptor of a buffer for another library: PEERBUF_DMABUF or PEERBUF_MEMFD. The caller
// closes it. -1 on failure.
peerbuf_code peerbuf_buffer_descriptor(const peerbuf_buffer *buffer,
                                       uint32_t which,
                                       int *fd);

// Tells which handle of a buffer an engine takes: "ucx", "nixl", "libfabric" (its providers tcp, shm, sockets and udp) or
// "verbs". PEERBUF_MEMFD: a pointer to a mapping of that descriptor; PEERBUF_DMABUF: that descriptor itself.
// PEERBUF_CODE_UNSUITABLE for an engine that is not known, and for a buffer without a handle that the engine takes.
peerbuf_code peerbuf_buffer_for_engine(const peerbuf_buffer *buffer,
                                       const char *engine,
                                       uint32_t *which);

// Frees a buffer. A lent buffer returns to its publisher once its mappings are freed, too. Null does
// nothing.
peerbuf_code peerbuf_buffer_free(peerbuf_buffer *buffer);

// Maps `length` bytes of a buffer from `offset`, or up to the end (PEERBUF_ANY). The mapping keeps the
// buffer.
peerbuf_code peerbuf_map(const peerbuf_buffer *buffer,
                         uint64_t offset,
                         uint64_t length,
                         uint32_t access,
                         peerbuf_mapping **mapping);

// Returns the address and the number of the bytes, valid until the mapping is freed. Others may change the
// bytes at any time; an access to memory of a device that went away raises SIGBUS.
peerbuf_code peerbuf_mapping_get(const peerbuf_mapping *mapping,
                                 void **data,
                                 uint64_t *length);

// Begins a CPU access to the bytes (DMA_BUF_IOCTL_SYNC): waits for devices, and synchronises caches. One
// access at a time for each mapping.
peerbuf_code peerbuf_begin_access(const peerbuf_mapping *mapping,
                                  uint32_t access);

// Ends the CPU access: devices then see the written bytes.
peerbuf_code peerbuf_end_access(const peerbuf_mapping *mapping);

// Frees a mapping, and ends an access to it. Null does nothing.
peerbuf_code peerbuf_mapping_free(peerbuf_mapping *mapping);

// Opens an existing file or block device for PEERBUF_READ, PEERBUF_WRITE or both.
peerbuf_code peerbuf_file_open(const char *path, uint32_t access, peerbuf_file **file);

// Takes an open file. The caller keeps the descriptor; its position and flags do not change.
peerbuf_code peerbuf_file_from_descriptor(int fd, const char *name, peerbuf_file **file);

// Returns the current size in bytes.
peerbuf_code peerbuf_file_size(const peerbuf_file *file, uint64_t *size);

// Makes written bytes durable (fdatasync).
peerbuf_code peerbuf_file_sync(const peerbuf_file *file);

// Reads the file from `file_offset` into a range of a buffer, up to the end of the file. `length` may be
// PEERBUF_ANY. `report` gets a report; it may be null.
peerbuf_code peerbuf_file_read(const peerbuf_file *file,
                               uint64_t file_offset,
                               const peerbuf_buffer *buffer,
                               uint64_t offset,
                               uint64_t length,
                               peerbuf_report **report);

// Writes a range of a buffer to the file at `file_offset`; otherwise as `peerbuf_file_read`.
peerbuf_code peerbuf_file_write(const peerbuf_file *file,
                                uint64_t file_offset,
                                const peerbuf_buffer *buffer,
                                uint64_t offset,
                                uint64_t length,
                                peerbuf_report **report);

// Returns the path that a transfer would take, in PEERBUF_DISK_TO_BUFFER or PEERBUF_BUFFER_TO_DISK. The
// first call for a pair of devices proves the path; no one else may use the range meanwhile.
peerbuf_code peerbuf_file_plan(const peerbuf_file *file,
                               uint64_t file_offset,
                               const peerbuf_buffer *buffer,
                               uint64_t offset,
                               uint64_t length,
                               uint32_t direction,
                               peerbuf_report **report);

// Closes and frees a file. Null does nothing.
peerbuf_code peerbuf_file_free(peerbuf_file *file);

// Returns the contents of a report.
peerbuf_code peerbuf_report_get(const peerbuf_report *report, peerbuf_report_info *info);

// Frees a report. Null does nothing.
peerbuf_code peerbuf_report_free(peerbuf_report *report);

// Makes a connected pair of channels, for a process and its child.
peerbuf_code peerbuf_channel_pair(peerbuf_channel **one, peerbuf_channel **other);

// Connects to a listener at `path`.
peerbuf_code peerbuf_channel_connect(const char *path, peerbuf_channel **channel);

// Takes a connected unix socket of type SOCK_SEQPACKET. The caller keeps the descriptor.
peerbuf_code peerbuf_channel_from_descriptor(int fd, peerbuf_channel **channel);

// Returns the channel's descriptor, for poll. The channel still owns and closes it.
peerbuf_code peerbuf_channel_descriptor(const peerbuf_channel *channel, int *fd);

// Returns the peer's process.
peerbuf_code peerbuf_channel_peer(const peerbuf_channel *channel, peerbuf_peer *peer);

// Sends a range of a buffer. `length` may be PEERBUF_ANY. The receiver gets access to the whole buffer.
peerbuf_code peerbuf_send(const peerbuf_channel *channel,
                          const peerbuf_buffer *buffer,
                          uint64_t offset,
                          uint64_t length);

// Waits for a range from the peer, up to `milliseconds`; forever if negative. `offset` and `length` are the
// range in the buffer; each may be null.
peerbuf_code peerbuf_receive(const peerbuf_channel *channel,
                             int64_t milliseconds,
                             peerbuf_buffer **buffer,
                             uint64_t *offset,
                             uint64_t *length);

// Closes and frees a channel. Null does nothing.
peerbuf_code peerbuf_channel_free(peerbuf_channel *channel);

// Listens at `path`. Only the same user may connect, unless the file's mode is changed.
peerbuf_code peerbuf_listen(const char *path, peerbuf_listener **listener);

// Waits for a process to connect.
peerbuf_code peerbuf_accept(const peerbuf_listener *listener, peerbuf_channel **channel);

// Frees a listener, and removes its socket file. Null does nothing.
peerbuf_code peerbuf_listener_free(peerbuf_listener *listener);

// Connects to the publisher at `path`.
peerbuf_code peerbuf_subscribe(const char *path, peerbuf_subscriber **subscriber);

// Subscribes over a connected unix socket of type SOCK_SEQPACKET. The caller keeps and closes the
// descriptor.
peerbuf_code peerbuf_subscribe_descriptor(int fd, peerbuf_subscriber **subscriber);

// Borrows the buffer published as `name`. Waits for it up to `milliseconds`; forever if negative. The buffer
// returns to the publisher when it and its mappings are freed; a publisher that moves the buffer waits for
// that.
peerbuf_code peerbuf_borrow(const peerbuf_subscriber *subscriber,
                            const char *name,
                            int64_t milliseconds,
                            peerbuf_buffer **buffer);

// Waits up to `milliseconds` until the publisher wants a lent buffer back; 0 does not wait. `wanted` tells
// whether it does.
peerbuf_code peerbuf_wanted_back(const peerbuf_buffer *buffer,
                                 uint32_t milliseconds,
                                 bool *wanted);

// Frees a subscriber. Its borrowed buffers stay mapped, but the publisher does not wait for them. Null does
// nothing.
peerbuf_code peerbuf_subscriber_free(peerbuf_subscriber *subscriber);

// Takes a `struct ibv_pd *` of libibverbs.so.1. The program still owns it, and deallocates it after this
// domain and its registrations are freed.
peerbuf_code peerbuf_domain_from_pd(void *pd,
                                    peerbuf_domain **domain);

// Frees a domain. Null does nothing.
peerbuf_code peerbuf_domain_free(peerbuf_domain *domain);

// Registers a range of a buffer with the card, by the best rung that works. `length` may be PEERBUF_ANY.
// `remote` is the access allowed to the peer: 0, or an access. `report` gets the path and the reason against
// each better one; it may be null.
peerbuf_code peerbuf_register(const peerbuf_domain *domain,
                              const peerbuf_buffer *buffer,
                              uint64_t offset,
                              uint64_t length,
                              uint32_t remote,
                              peerbuf_registration **registration,
                              peerbuf_report **report);

// Returns the arguments for work requests.
peerbuf_code peerbuf_registration_get(const peerbuf_registration *registration,
                                      peerbuf_registration_info *info);

// Makes a range of the buffer visible to the card; to call before work that reads it. Copies only for
// `staged`.
peerbuf_code peerbuf_registration_refresh(const peerbuf_registration *registration,
                                          uint64_t offset,
                                          uint64_t length);

// Makes the card's writes visible in the buffer; to call after that work. Copies only for `staged`.
peerbuf_code peerbuf_registration_deliver(const peerbuf_registration *registration,
                                          uint64_t offset,
                                          uint64_t length);

// Deregisters the range and frees the registration. Work in flight fails. Null does nothing.
peerbuf_code peerbuf_registration_free(peerbuf_registration *registration);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PEERBUF_H */
