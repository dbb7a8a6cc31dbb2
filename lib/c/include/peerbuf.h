/* peerbuf for C. Made by cbindgen: change lib/c/src, then
   PEERBUF_WRITE_HEADER=1 cargo test -p peerbuf-c --test header */

#ifndef PEERBUF_H
#define PEERBUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// For reading: an access.
#define PEERBUF_READ 1

// For writing: an access.
#define PEERBUF_WRITE 2

// For both.
#define PEERBUF_READ_WRITE 3

// As an offset in a BAR: anywhere. As a length: all that follows.
#define PEERBUF_ANY UINT64_MAX

// The dma-buf of a buffer.
#define PEERBUF_DMABUF 1

// The memfd that holds the bytes of a buffer.
#define PEERBUF_MEMFD 2

// The processor copies through a bounce buffer: a path.
#define PEERBUF_STAGED_COPY 1

// Both ends use the same pages of system memory: a path.
#define PEERBUF_SHARED_HOST_MEMORY 2

// The disk reads and writes the buffer's memory itself: a path.
#define PEERBUF_PEER_TO_PEER 3

// From the file into the buffer: a direction.
#define PEERBUF_DISK_TO_BUFFER 1

// From the buffer to the file: a direction.
#define PEERBUF_BUFFER_TO_DISK 2

// What a function returns. The numbers never change; new ones may come.
typedef enum {
  // It did what it is for.
  PEERBUF_CODE_OK = 0,
  // An argument cannot be: a null pointer, a text that is not UTF-8, an unknown number.
  PEERBUF_CODE_ARGUMENT = 1,
  // No handle, one that was freed, or one of another type.
  PEERBUF_CODE_HANDLE = 2,
  // Not in this order: an access that has begun already, or has not begun.
  PEERBUF_CODE_ORDER = 3,
  // A fault of this library.
  PEERBUF_CODE_INTERNAL = 4,
  // A system call failed; `system_error` is its number.
  PEERBUF_CODE_SYSTEM = 5,
  // The machine lacks what was asked for.
  PEERBUF_CODE_UNAVAILABLE = 6,
  // A length, an offset or a name that does not do.
  PEERBUF_CODE_UNSUITABLE = 7,
  // The module and this library are of different releases.
  PEERBUF_CODE_VERSION = 8,
  // The descriptor is not of a dma-buf.
  PEERBUF_CODE_NOT_A_DMABUF = 9,
  // Memory that somebody else could shorten.
  PEERBUF_CODE_NOT_SEALED = 10,
  // The bytes asked for are not all inside.
  PEERBUF_CODE_OUT_OF_RANGE = 11,
  // Writing what is for reading only, or the reverse.
  PEERBUF_CODE_ACCESS = 12,
  // It did not happen in time.
  PEERBUF_CODE_TIMED_OUT = 13,
  // It belongs to the process that this one was forked from.
  PEERBUF_CODE_INHERITED = 14,
  // The other end of the connection has gone.
  PEERBUF_CODE_PEER_GONE = 15,
  // What the other end sent breaks the protocol.
  PEERBUF_CODE_MALFORMED = 16,
  // The publisher ended the connection.
  PEERBUF_CODE_CUT_OFF = 17,
  // The descriptor is not a unix socket of the seqpacket kind.
  PEERBUF_CODE_WRONG_SOCKET = 18,
  // Neither a regular file nor a block device.
  PEERBUF_CODE_NOT_A_FILE = 19,
  // The file does not do for this as it is open.
  PEERBUF_CODE_FILE_MODE = 20,
  // The file took fewer bytes than it was given.
  PEERBUF_CODE_SHORT_WRITE = 21,
  // No way to give the card the buffer has worked; the evidence has each.
  PEERBUF_CODE_NOT_REGISTERED = 22,
  // The buffer is not what was registered any more.
  PEERBUF_CODE_STALE = 23,
  // Anything else; the message says what.
  PEERBUF_CODE_OTHER = 24,
} peerbuf_code;

// Memory that devices, files and processes can use.
typedef struct peerbuf_buffer peerbuf_buffer;

// One end of a connection that buffers travel over.
typedef struct peerbuf_channel peerbuf_channel;

// The program's protection domain.
typedef struct peerbuf_domain peerbuf_domain;

// An open file or block device.
typedef struct peerbuf_file peerbuf_file;

// A place in the filesystem where other processes connect.
typedef struct peerbuf_listener peerbuf_listener;

// Bytes of a buffer in this process.
typedef struct peerbuf_mapping peerbuf_mapping;

// A range of a buffer that a card may use.
typedef struct peerbuf_registration peerbuf_registration;

// What a transfer did, or would do.
typedef struct peerbuf_report peerbuf_report;

// A connection to a publisher.
typedef struct peerbuf_subscriber peerbuf_subscriber;

// The last failure of a thread. The texts are never null, and stay until the thread's next failure.
typedef struct {
  // What the function returned; `PEERBUF_CODE_OK` where none has failed yet.
  peerbuf_code code;
  // The number that a system call returned (errno); 0 where none failed.
  int system_error;
  // What was tried, on what, and what came back.
  const char *message;
  // The call that failed, its object and its answer; empty where none did.
  const char *evidence;
  // What to do.
  const char *remedy;
} peerbuf_error;

// What is known of a buffer.
typedef struct {
  // In bytes.
  uint64_t size;
  // The number of a lent buffer's generation; 0 for others.
  uint64_t generation;
  // The kind of exporter, by its number in docs/wire.md.
  uint32_t kind;
  // Whether it may be written.
  bool writable;
  // Whether it has a dma-buf.
  bool has_dmabuf;
  // Whether it has a memfd.
  bool has_memfd;
} peerbuf_buffer_info;

// What a report says. The texts are good until the report is freed.
typedef struct {
  // PEERBUF_STAGED_COPY, PEERBUF_SHARED_HOST_MEMORY or PEERBUF_PEER_TO_PEER.
  uint32_t path;
  // Its name.
  const char *path_name;
  // Bytes moved; 0 in a plan. Fewer than asked for only where a file that was read ended.
  uint64_t bytes;
  // Of these, the bytes that were in system memory on their way.
  uint64_t host_bytes;
  // All of it, with the reason against each better path: {"path": ..., "bytes": ..., "host_bytes": ...,
  // "reasons": [{"path": ..., "code": ..., "evidence": ...}]}.
  const char *json;
} peerbuf_report_info;

// The process at the other end when the connection was made, as the kernel vouches for it.
typedef struct {
  // Process id; 0 for a process of another PID namespace.
  int32_t pid;
  // User id.
  uint32_t uid;
  // Group id.
  uint32_t gid;
} peerbuf_peer;

// What work requests name.
typedef struct {
  // The address of the range's first byte, here and at the other end.
  uint64_t address;
  // The length of the range in bytes.
  uint64_t length;
  // For this end's work requests.
  uint32_t lkey;
  // For the other end's.
  uint32_t rkey;
  // How the card was given the buffer: `dma-buf-by-library`, `dma-buf-by-kernel`, `shared-memory` or `staged`.
  const char *rung;
  // The `struct ibv_mr *`, which stays the registration's; null where libibverbs did not make it.
  void *mr;
} peerbuf_registration_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// What is known of this thread's last failure. Never null, and good until the thread's next failure.
const peerbuf_error *peerbuf_last_error(void);

// The version of the library, such as `0.1.0`.
const char *peerbuf_version(void);

// Makes a buffer of `length` zero bytes of memory, without a dma-buf: for files and processes, on any
// machine. `name` is for people, here and below.
peerbuf_code peerbuf_export_memfd(const char *name,
                                  uint64_t length,
                                  peerbuf_buffer **buffer);

// Makes a dma-buf of `length` zero bytes of memory (/dev/udmabuf), a multiple of the page size.
peerbuf_code peerbuf_export_udmabuf(const char *name, uint64_t length, peerbuf_buffer **buffer);

// Makes a dma-buf of `length` zero bytes of the dma-heap `heap`, such as `system`; a multiple of the page size.
peerbuf_code peerbuf_export_heap(const char *heap,
                                 const char *name,
                                 uint64_t length,
                                 peerbuf_buffer **buffer);

// Exports part of a device's BAR by peerbuf.ko. `device` is a PCI address, such as `0000:01:00.0`, or the path of
// the device's node. `offset` may be PEERBUF_ANY. `access` is what the descriptor allows.
peerbuf_code peerbuf_export_bar(const char *device,
                                uint32_t bar,
                                uint64_t offset,
                                uint64_t length,
                                uint32_t access,
                                peerbuf_buffer **buffer);

// Takes a dma-buf, or a memfd with F_SEAL_SHRINK, that another library or program made. What the kernel does not tell of
// it stays unknown. The descriptor stays the caller's.
peerbuf_code peerbuf_import(int fd,
                            peerbuf_buffer **buffer);

// Tells what is known of a buffer.
peerbuf_code peerbuf_buffer_get(const peerbuf_buffer *buffer, peerbuf_buffer_info *info);

// Gives a descriptor of a buffer, for another library: PEERBUF_DMABUF or PEERBUF_MEMFD. The caller closes it. -1 after
// a failure.
peerbuf_code peerbuf_buffer_descriptor(const peerbuf_buffer *buffer,
                                       uint32_t which,
                                       int *fd);

// Ends a buffer. A lent one goes back to its publisher when its mappings have been freed, too. Null does nothing.
peerbuf_code peerbuf_buffer_free(peerbuf_buffer *buffer);

// Maps `length` bytes of a buffer from `offset` on, or all that follow (PEERBUF_ANY). It keeps the buffer.
peerbuf_code peerbuf_map(const peerbuf_buffer *buffer,
                         uint64_t offset,
                         uint64_t length,
                         uint32_t access,
                         peerbuf_mapping **mapping);

// Tells where the bytes are, and how many. They are good until the mapping is freed. Others may change them at any
// time, and memory of a device that goes away raises SIGBUS.
peerbuf_code peerbuf_mapping_get(const peerbuf_mapping *mapping,
                                 void **data,
                                 uint64_t *length);

// Begins a time in which the processor may use the bytes (DMA_BUF_IOCTL_SYNC): waits for devices, and makes caches
// agree. One at a time for each mapping.
peerbuf_code peerbuf_begin_access(const peerbuf_mapping *mapping,
                                  uint32_t access);

// Ends that time: what was written is where devices see it.
peerbuf_code peerbuf_end_access(const peerbuf_mapping *mapping);

// Ends a mapping, and an access to it. Null does nothing.
peerbuf_code peerbuf_mapping_free(peerbuf_mapping *mapping);

// Opens an existing file or block device, for PEERBUF_READ, PEERBUF_WRITE or both.
peerbuf_code peerbuf_file_open(const char *path, uint32_t access, peerbuf_file **file);

// Takes an open file. The descriptor stays the caller's, and its position and flags as they are.
peerbuf_code peerbuf_file_from_descriptor(int fd, const char *name, peerbuf_file **file);

// Tells the size in bytes at this moment.
peerbuf_code peerbuf_file_size(const peerbuf_file *file, uint64_t *size);

// Makes what was written durable (fdatasync).
peerbuf_code peerbuf_file_sync(const peerbuf_file *file);

// Fills a range of a buffer with the file's bytes from `file_offset` on, or with as many as there are. `length` may be
// PEERBUF_ANY. `report` says how; it may be null.
peerbuf_code peerbuf_file_read(const peerbuf_file *file,
                               uint64_t file_offset,
                               const peerbuf_buffer *buffer,
                               uint64_t offset,
                               uint64_t length,
                               peerbuf_report **report);

// Writes a range of a buffer to the file, from `file_offset` on; otherwise as `peerbuf_file_read`.
peerbuf_code peerbuf_file_write(const peerbuf_file *file,
                                uint64_t file_offset,
                                const peerbuf_buffer *buffer,
                                uint64_t offset,
                                uint64_t length,
                                peerbuf_report **report);

// Chooses the path that a transfer would take, in PEERBUF_DISK_TO_BUFFER or PEERBUF_BUFFER_TO_DISK. The first time for
// a pair of devices it proves the path, and nobody else may use the range meanwhile.
peerbuf_code peerbuf_file_plan(const peerbuf_file *file,
                               uint64_t file_offset,
                               const peerbuf_buffer *buffer,
                               uint64_t offset,
                               uint64_t length,
                               uint32_t direction,
                               peerbuf_report **report);

// Ends a file. Null does nothing.
peerbuf_code peerbuf_file_free(peerbuf_file *file);

// Tells what a report says.
peerbuf_code peerbuf_report_get(const peerbuf_report *report, peerbuf_report_info *info);

// Ends a report. Null does nothing.
peerbuf_code peerbuf_report_free(peerbuf_report *report);

// Makes both ends of a connection, for a process and its child.
peerbuf_code peerbuf_channel_pair(peerbuf_channel **one, peerbuf_channel **other);

// Connects to a listener at `path`.
peerbuf_code peerbuf_channel_connect(const char *path, peerbuf_channel **channel);

// Takes a connected unix socket of the seqpacket kind. The descriptor stays the caller's.
peerbuf_code peerbuf_channel_from_descriptor(int fd, peerbuf_channel **channel);

// Tells the channel's descriptor, to wait for with poll. It stays the channel's, and is closed with it.
peerbuf_code peerbuf_channel_descriptor(const peerbuf_channel *channel,
                                        int *fd);

// Tells who is at the other end.
peerbuf_code peerbuf_channel_peer(const peerbuf_channel *channel, peerbuf_peer *peer);

// Hands over a range of a buffer. `length` may be PEERBUF_ANY. The other end gets access to the whole buffer.
peerbuf_code peerbuf_send(const peerbuf_channel *channel,
                          const peerbuf_buffer *buffer,
                          uint64_t offset,
                          uint64_t length);

// Waits for a range to be handed over, up to `milliseconds`, or for ever if that is negative. `offset` and `length`
// are the range in the buffer; each may be null.
peerbuf_code peerbuf_receive(const peerbuf_channel *channel,
                             int64_t milliseconds,
                             peerbuf_buffer **buffer,
                             uint64_t *offset,
                             uint64_t *length);

// Ends a channel. Null does nothing.
peerbuf_code peerbuf_channel_free(peerbuf_channel *channel);

// Listens at `path`. Only this user may connect, unless the file's mode is changed.
peerbuf_code peerbuf_listen(const char *path, peerbuf_listener **listener);

// Waits for a process to connect.
peerbuf_code peerbuf_accept(const peerbuf_listener *listener, peerbuf_channel **channel);

// Ends a listener, and removes its socket file. Null does nothing.
peerbuf_code peerbuf_listener_free(peerbuf_listener *listener);

// Connects to the publisher that listens at `path`.
peerbuf_code peerbuf_subscribe(const char *path, peerbuf_subscriber **subscriber);

// Subscribes over a connected unix socket of the seqpacket kind. The descriptor stays the caller's, who closes it.
peerbuf_code peerbuf_subscribe_descriptor(int fd,
                                          peerbuf_subscriber **subscriber);

// Borrows the buffer that is published as `name`. Waits until it is offered, up to `milliseconds`, or for ever if that
// is negative. The publisher gets it back when the buffer and its mappings have been freed; it waits for that when
// it moves the buffer.
peerbuf_code peerbuf_borrow(const peerbuf_subscriber *subscriber,
                            const char *name,
                            int64_t milliseconds,
                            peerbuf_buffer **buffer);

// Waits up to `milliseconds` until the publisher wants a lent buffer back. `wanted` says whether it does; without a
// wait if `milliseconds` is 0.
peerbuf_code peerbuf_wanted_back(const peerbuf_buffer *buffer,
                                 uint32_t milliseconds,
                                 bool *wanted);

// Ends a subscriber. What it has borrowed stays memory, but the publisher does not wait for it. Null does nothing.
peerbuf_code peerbuf_subscriber_free(peerbuf_subscriber *subscriber);

// Takes a `struct ibv_pd *` of libibverbs.so.1. It stays the program's, which deallocates it after this domain and its
// registrations have been freed.
peerbuf_code peerbuf_domain_from_pd(void *pd,
                                    peerbuf_domain **domain);

// Ends a domain. Null does nothing.
peerbuf_code peerbuf_domain_free(peerbuf_domain *domain);

// Gives the card a range of a buffer, in the best way that works. `length` may be PEERBUF_ANY. `remote` is what the other
// end may do: 0, or an access. `report` has the path and the reason against each better one; it may be null.
peerbuf_code peerbuf_register(const peerbuf_domain *domain,
                              const peerbuf_buffer *buffer,
                              uint64_t offset,
                              uint64_t length,
                              uint32_t remote,
                              peerbuf_registration **registration,
                              peerbuf_report **report);

// Tells what work requests name.
peerbuf_code peerbuf_registration_get(const peerbuf_registration *registration,
                                      peerbuf_registration_info *info);

// Brings a range of the buffer to where the card reads it: before work that reads it. Only `staged` copies.
peerbuf_code peerbuf_registration_refresh(const peerbuf_registration *registration,
                                          uint64_t offset,
                                          uint64_t length);

// Brings a range from where the card has written it to the buffer: after that work. Only `staged` copies.
peerbuf_code peerbuf_registration_deliver(const peerbuf_registration *registration,
                                          uint64_t offset,
                                          uint64_t length);

// Takes the range from the card. Work in flight fails. Null does nothing.
peerbuf_code peerbuf_registration_free(peerbuf_registration *registration);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PEERBUF_H */
