/* Every verb, mostly as it should not be used, and subscribing as it should. Standard input is a connection to a
   publisher of "weights". */
#define _GNU_SOURCE
#include <fcntl.h>
#include <peerbuf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* The expression gives this code. */
#define GIVES(code, expression) gives(PEERBUF_CODE_##code, expression, #expression, __LINE__)
#define OK(expression) GIVES(OK, expression)

static void gives(peerbuf_code wanted, peerbuf_code got, const char *what, int line) {
    const peerbuf_error *error = peerbuf_last_error();
    if (got != wanted) {
        fprintf(stderr, "line %d: %s: %d, not %d (%s)\n", line, what, got, wanted, error->message);
        exit(1);
    }
    if (got == PEERBUF_CODE_OK) return;
    if (error->code != got || !*error->message || !*error->remedy || !error->evidence) {
        fprintf(stderr, "line %d: %s: not explained\n", line, what);
        exit(1);
    }
}

static void holds(int truth, const char *what, int line) {
    if (truth) return;
    fprintf(stderr, "line %d: not %s\n", line, what);
    exit(1);
}
#define HOLDS(truth) holds(truth, #truth, __LINE__)

static void misuse(void) {
    peerbuf_buffer *buffer = NULL, *none = (peerbuf_buffer *)8;
    peerbuf_mapping *mapping;
    peerbuf_buffer_info info;
    peerbuf_channel *ours, *theirs;
    peerbuf_subscriber *subscriber;
    peerbuf_registration *registration;
    peerbuf_listener *listener;
    peerbuf_domain *domain;
    peerbuf_report *report;
    peerbuf_peer peer;
    peerbuf_file *file;
    uint64_t offset, length;
    void *data;
    int fd;

    HOLDS(peerbuf_last_error()->code == PEERBUF_CODE_OK && *peerbuf_last_error()->message == 0);
    HOLDS(strchr(peerbuf_version(), '.') != NULL);

    GIVES(ARGUMENT, peerbuf_export_memfd(NULL, 4096, &buffer));
    HOLDS(buffer == NULL);
    GIVES(ARGUMENT, peerbuf_export_memfd("\xff", 4096, &buffer));
    GIVES(ARGUMENT, peerbuf_export_memfd("x", 4096, NULL));
    GIVES(UNSUITABLE, peerbuf_export_udmabuf("x", 4097, &buffer));
    GIVES(UNAVAILABLE, peerbuf_export_heap("no such heap", "x", 4096, &buffer));
    HOLDS(strstr(peerbuf_last_error()->evidence, "open") && peerbuf_last_error()->system_error > 0);
    GIVES(ARGUMENT, peerbuf_export_bar("nonsense", 0, PEERBUF_ANY, 4096, PEERBUF_READ, &buffer));
    GIVES(ARGUMENT, peerbuf_export_bar("0000:00:00.0", 256, 0, 4096, PEERBUF_READ, &buffer));
    GIVES(UNAVAILABLE, peerbuf_export_bar("ffff:ff:1f.7", 0, 0, 4096, PEERBUF_READ, &buffer));

    /* A handle that is none, was freed, or is of another type. */
    OK(peerbuf_export_memfd("memory", 8192, &buffer));
    GIVES(ARGUMENT, peerbuf_buffer_get(buffer, NULL));
    GIVES(HANDLE, peerbuf_buffer_get(NULL, &info));
    GIVES(HANDLE, peerbuf_buffer_get(none, &info));
    GIVES(HANDLE, peerbuf_file_size((peerbuf_file *)buffer, &length));
    GIVES(HANDLE, peerbuf_file_free((peerbuf_file *)buffer));
    OK(peerbuf_buffer_get(buffer, &info));
    HOLDS(info.size == 8192 && info.writable && info.has_memfd && !info.has_dmabuf && info.kind == 3);
    none = buffer;
    OK(peerbuf_buffer_free(none));
    GIVES(HANDLE, peerbuf_buffer_free(none));
    GIVES(HANDLE, peerbuf_buffer_get(none, &info));
    OK(peerbuf_export_memfd("memory", 8192, &buffer));
    GIVES(HANDLE, peerbuf_buffer_get(none, &info));
    OK(peerbuf_buffer_free(NULL));

    /* Mappings: sizes, access, order. */
    GIVES(OUT_OF_RANGE, peerbuf_map(buffer, 4096, 4097, PEERBUF_READ, &mapping));
    GIVES(OUT_OF_RANGE, peerbuf_map(buffer, 8193, PEERBUF_ANY, PEERBUF_READ, &mapping));
    GIVES(ARGUMENT, peerbuf_map(buffer, 0, 1, 4, &mapping));
    OK(peerbuf_map(buffer, 100, PEERBUF_ANY, PEERBUF_READ, &mapping));
    GIVES(ARGUMENT, peerbuf_mapping_get(mapping, NULL, &length));
    OK(peerbuf_mapping_get(mapping, &data, &length));
    HOLDS(length == 8092 && *(char *)data == 0);
    GIVES(ACCESS, peerbuf_begin_access(mapping, PEERBUF_WRITE));
    GIVES(ORDER, peerbuf_end_access(mapping));
    OK(peerbuf_begin_access(mapping, PEERBUF_READ));
    GIVES(ORDER, peerbuf_begin_access(mapping, PEERBUF_READ));
    OK(peerbuf_mapping_free(mapping));
    GIVES(HANDLE, peerbuf_end_access(mapping));

    /* Descriptors of others, which stay theirs. */
    GIVES(ARGUMENT, peerbuf_import(-1, &none));
    fd = open("/dev/null", O_RDWR);
    GIVES(NOT_A_DMABUF, peerbuf_import(fd, &none));
    GIVES(WRONG_SOCKET, peerbuf_channel_from_descriptor(fd, &ours));
    GIVES(NOT_A_FILE, peerbuf_file_from_descriptor(fd, "x", &file));
    OK(close(fd) == 0 ? PEERBUF_CODE_OK : PEERBUF_CODE_OTHER);
    fd = memfd_create("x", MFD_ALLOW_SEALING);
    HOLDS(ftruncate(fd, 4096) == 0);
    GIVES(NOT_SEALED, peerbuf_import(fd, &none));
    HOLDS(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    OK(peerbuf_import(fd, &none));
    HOLDS(pwrite(fd, "seen", 4, 0) == 4 && close(fd) == 0);
    OK(peerbuf_map(none, 0, 4, PEERBUF_READ, &mapping));
    OK(peerbuf_buffer_free(none));
    OK(peerbuf_mapping_get(mapping, &data, NULL));
    HOLDS(memcmp(data, "seen", 4) == 0);
    OK(peerbuf_mapping_free(mapping));
    GIVES(UNAVAILABLE, peerbuf_buffer_descriptor(buffer, PEERBUF_DMABUF, &fd));
    HOLDS(fd == -1);
    OK(peerbuf_buffer_descriptor(buffer, PEERBUF_MEMFD, &fd));
    HOLDS(close(fd) == 0);
    uint32_t handle = 0;
    OK(peerbuf_buffer_for_engine(buffer, "ucx", &handle));
    HOLDS(handle == PEERBUF_MEMFD);
    GIVES(UNSUITABLE, peerbuf_buffer_for_engine(buffer, "no such engine", &handle));

    /* Files. */
    GIVES(SYSTEM, peerbuf_file_open("no such file", PEERBUF_READ, &file));
    HOLDS(file == NULL && peerbuf_last_error()->system_error == 2);
    HOLDS(close(open("file", O_CREAT | O_WRONLY, 0600)) == 0);
    OK(peerbuf_file_open("file", PEERBUF_READ, &file));
    GIVES(FILE_MODE, peerbuf_file_write(file, 0, buffer, 0, PEERBUF_ANY, &report));
    GIVES(OUT_OF_RANGE, peerbuf_file_read(file, 0, buffer, 0, 8193, &report));
    GIVES(ARGUMENT, peerbuf_file_plan(file, 0, buffer, 0, 8192, 3, &report));
    OK(peerbuf_file_plan(file, 0, buffer, 0, 8192, PEERBUF_DISK_TO_BUFFER, &report));
    OK(peerbuf_report_free(report));
    GIVES(HANDLE, peerbuf_report_free(report));
    GIVES(HANDLE, peerbuf_report_get(report, NULL));
    OK(peerbuf_file_sync(file));
    OK(peerbuf_file_free(file));

    /* Channels. */
    GIVES(SYSTEM, peerbuf_channel_connect("no such socket", &ours));
    OK(peerbuf_channel_pair(&ours, &theirs));
    OK(peerbuf_channel_peer(theirs, &peer));
    HOLDS(peer.pid == getpid() && peer.uid == geteuid());
    OK(peerbuf_channel_descriptor(theirs, &fd));
    HOLDS(fcntl(fd, F_GETFD) == FD_CLOEXEC);
    GIVES(TIMED_OUT, peerbuf_receive(theirs, 0, &none, NULL, NULL));
    OK(peerbuf_send(ours, buffer, 4096, PEERBUF_ANY));
    OK(peerbuf_receive(theirs, 1000, &none, &offset, &length));
    HOLDS(offset == 4096 && length == 4096);
    OK(peerbuf_channel_free(ours));
    GIVES(PEER_GONE, peerbuf_receive(theirs, -1, &none, NULL, NULL));
    GIVES(ARGUMENT, peerbuf_wanted_back(buffer, 0, NULL));
    OK(peerbuf_channel_free(theirs));
    OK(peerbuf_buffer_free(buffer));
    /* The card's part; a machine without libibverbs has none. */
    GIVES(HANDLE, peerbuf_register(NULL, NULL, 0, 1, 0, &registration, &report));
    HOLDS(registration == NULL && report == NULL);
    HOLDS(peerbuf_domain_from_pd(NULL, &domain) != PEERBUF_CODE_OK && domain == NULL);
    GIVES(HANDLE, peerbuf_registration_get(registration, NULL));
    GIVES(HANDLE, peerbuf_registration_refresh(registration, 0, 1));
    GIVES(HANDLE, peerbuf_registration_deliver(registration, 0, 1));
    OK(peerbuf_registration_free(registration));
    OK(peerbuf_domain_free(domain));

    GIVES(SYSTEM, peerbuf_listen("no such directory/socket", &listener));
    GIVES(HANDLE, peerbuf_accept(listener, &ours));
    GIVES(SYSTEM, peerbuf_subscribe("no such socket", &subscriber));
    OK(peerbuf_listen("socket", &listener));
    OK(peerbuf_channel_connect("socket", &theirs));
    OK(peerbuf_accept(listener, &ours));
    OK(peerbuf_listener_free(listener));
    HOLDS(access("socket", F_OK) == -1);
    OK(peerbuf_channel_free(ours));
    OK(peerbuf_channel_free(theirs));
}

/* Adds 1 to the first byte of two generations, and gives the first back when it is wanted. */
static void subscribe(void) {
    peerbuf_subscriber *subscriber;
    peerbuf_channel *ours, *theirs;
    peerbuf_buffer *weights;
    peerbuf_buffer_info info;
    peerbuf_mapping *mapping;
    bool wanted;
    void *data;

    OK(peerbuf_subscribe_descriptor(0, &subscriber));
    close(0);
    GIVES(TIMED_OUT, peerbuf_borrow(subscriber, "something else", 0, &weights));
    for (uint64_t generation = 1; generation <= 2; generation++) {
        OK(peerbuf_borrow(subscriber, "weights", 20000, &weights));
        OK(peerbuf_buffer_get(weights, &info));
        HOLDS(info.generation == generation && info.size == 8192);
        OK(peerbuf_wanted_back(weights, 0, &wanted));
        HOLDS(!wanted);
        OK(peerbuf_channel_pair(&ours, &theirs));
        GIVES(ARGUMENT, peerbuf_send(ours, weights, 0, 1));
        OK(peerbuf_map(weights, 0, 1, PEERBUF_READ_WRITE, &mapping));
        OK(peerbuf_mapping_get(mapping, &data, NULL));
        OK(peerbuf_begin_access(mapping, PEERBUF_READ_WRITE));
        ++*(volatile char *)data;
        OK(peerbuf_end_access(mapping));
        if (generation == 1) {
            OK(peerbuf_wanted_back(weights, 20000, &wanted));
            HOLDS(wanted);
        }
        OK(peerbuf_buffer_free(weights));
        OK(peerbuf_mapping_free(mapping));
    }
    OK(peerbuf_subscriber_free(subscriber));
}

int main(void) {
    misuse();
    subscribe();
    return 0;
}
