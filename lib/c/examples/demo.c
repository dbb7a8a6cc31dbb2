/* A file goes into a buffer, the buffer to another process, and from there into another file:

       demo FROM TO [DEVICE BAR]

   The buffer is memory in a BAR of DEVICE, or of the system. Each transfer says which path its bytes took, and why not a better one. */
#include <fcntl.h>
#include <peerbuf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(peerbuf_code code) {
    const peerbuf_error *error = peerbuf_last_error();
    if (code == PEERBUF_CODE_OK) return;
    fprintf(stderr, "%s\n  evidence: %s\n  remedy: %s\n", error->message, error->evidence, error->remedy);
    exit(1);
}

static void say(const char *who, peerbuf_report *report) {
    peerbuf_report_info info;
    must(peerbuf_report_get(report, &info));
    printf("%s: %llu bytes, %s\n  %s\n", who, (unsigned long long)info.bytes, info.path_name, info.json);
    must(peerbuf_report_free(report));
}

static void receive_and_write(const peerbuf_channel *channel, const char *to) {
    uint64_t offset, length;
    peerbuf_buffer *buffer;
    peerbuf_report *report;
    peerbuf_file *file;
    must(peerbuf_receive(channel, 60000, &buffer, &offset, &length));
    must(peerbuf_file_from_descriptor(open(to, O_RDWR | O_CREAT | O_TRUNC, 0600), to, &file));
    must(peerbuf_file_write(file, 0, buffer, offset, length, &report));
    must(peerbuf_file_sync(file));
    say("receiver", report);
}

int main(int argc, char **argv) {
    peerbuf_channel *ours, *theirs;
    peerbuf_buffer *buffer, *again;
    peerbuf_mapping *sent, *written;
    peerbuf_report *report;
    peerbuf_file *from, *to;
    void *these, *those;
    uint64_t size;
    int status;

    if (argc != 3 && argc != 5) return 2;
    must(peerbuf_channel_pair(&ours, &theirs));
    pid_t child = fork();
    if (child == 0) {
        receive_and_write(theirs, argv[2]);
        return 0;
    }
    must(peerbuf_file_open(argv[1], PEERBUF_READ, &from));
    must(peerbuf_file_size(from, &size));
    uint64_t pages = (size + 4095) / 4096 * 4096;
    peerbuf_code code;
    if (argc == 5)
        code = peerbuf_export_bar(argv[3], atoi(argv[4]), PEERBUF_ANY, pages, PEERBUF_READ_WRITE, &buffer);
    else
        code = peerbuf_export_udmabuf("demo", pages, &buffer);
    if (code == PEERBUF_CODE_UNAVAILABLE && argc == 3) code = peerbuf_export_memfd("demo", pages, &buffer);
    must(code);
    must(peerbuf_file_read(from, 0, buffer, 0, size, &report));
    say("sender", report);
    must(peerbuf_send(ours, buffer, 0, size));
    if (waitpid(child, &status, 0) != child || status != 0) return 1;

    /* What the other process wrote is what this one has. */
    must(peerbuf_export_memfd("check", size, &again));
    must(peerbuf_file_open(argv[2], PEERBUF_READ, &to));
    must(peerbuf_file_read(to, 0, again, 0, PEERBUF_ANY, NULL));
    must(peerbuf_map(buffer, 0, size, PEERBUF_READ, &sent));
    must(peerbuf_map(again, 0, size, PEERBUF_READ, &written));
    must(peerbuf_mapping_get(sent, &these, NULL));
    must(peerbuf_mapping_get(written, &those, NULL));
    must(peerbuf_begin_access(sent, PEERBUF_READ));
    int differ = memcmp(these, those, size);
    must(peerbuf_end_access(sent));
    printf("%s\n", differ ? "the bytes differ" : "every byte arrived");
    return differ != 0;
}
