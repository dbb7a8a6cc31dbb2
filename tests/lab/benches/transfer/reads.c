/* Pieces of a file, read as a C program does with liburing: as many in flight as the ring has room for. */

#include <liburing.h>
#include <stdlib.h>

void *reads_open(unsigned depth)
{
	struct io_uring_params params = { .flags = IORING_SETUP_COOP_TASKRUN };
	struct io_uring *ring = malloc(sizeof(*ring));

	if (ring && io_uring_queue_init_params(depth, ring, &params)) {
		free(ring);
		ring = NULL;
	}
	return ring;
}

void reads_close(struct io_uring *ring)
{
	io_uring_queue_exit(ring);
	free(ring);
}

/* Reads `length` bytes at each place, to one part of the memory after the other. The result is 0, or that of
 * the request that did not read as much. */
int reads_run(struct io_uring *ring, unsigned depth, int fd, char *memory, unsigned long parts, unsigned length,
	      const unsigned long *places, unsigned long count)
{
	unsigned long begun = 0, answered = 0;

	while (answered < count) {
		struct io_uring_cqe *answer;
		unsigned head, seen = 0;
		int result;

		while (begun < count && begun - answered < depth) {
			struct io_uring_sqe *request = io_uring_get_sqe(ring);

			io_uring_prep_read(request, fd, memory + begun % parts * length, length, places[begun]);
			begun++;
		}
		result = io_uring_submit_and_wait(ring, 1);
		if (result < 0)
			return result;
		io_uring_for_each_cqe(ring, head, answer) {
			if (answer->res != (int)length)
				return answer->res ? answer->res : -1;
			seen++;
		}
		io_uring_cq_advance(ring, seen);
		answered += seen;
	}
	return 0;
}
