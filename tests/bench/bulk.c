/* As many bytes as go through in one direction. The time ends when the server has counted the last one: what waits in
 * buffers on the way has not been carried. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK (256 * 1024)
#define REPLY_MS 20000

static char chunk[CHUNK];
static int *sockets;

static void receive(int fd, void *to, size_t size)
{
	struct pollfd waiting = {.fd = fd, .events = POLLIN};
	ssize_t got;

	errno = ETIMEDOUT;
	if (poll(&waiting, 1, REPLY_MS) <= 0)
		die("no answer of the server");
	errno = 0;
	got = recv(fd, to, size, 0);
	if (got != (ssize_t)size)
		die("recv");
}

/* The first byte goes through and is answered before the clock starts: handshakes are not what is measured here. */
static int open_stream(const struct options *given)
{
	int fd = dial(&given->to);
	char answer;

	if (send(fd, chunk, 1, MSG_NOSIGNAL) != 1)
		die("send");
	receive(fd, &answer, 1);
	return fd;
}

static void push(int epoll, uint64_t end)
{
	struct epoll_event events[MAX_EVENTS];
	int at, ready;

	while (now_ns() < end) {
		ready = epoll_wait(epoll, events, MAX_EVENTS, 100);
		for (at = 0; at < ready; at++)
			if (send((int)events[at].data.u64, chunk, CHUNK, MSG_NOSIGNAL) < 0 && errno != EAGAIN)
				die("send");
	}
}

static void send_end(int fd)
{
	struct pollfd waiting = {.fd = fd, .events = POLLOUT};
	char end = SINK_END;

	errno = ETIMEDOUT;
	if (poll(&waiting, 1, REPLY_MS) <= 0 || send(fd, &end, 1, MSG_NOSIGNAL) != 1)
		die("send of the last byte");
}

void run_bulk(const struct options *given)
{
	int at, epoll = epoll_create1(EPOLL_CLOEXEC);
	uint64_t begin, bytes = 0;

	memset(chunk, SINK, sizeof(chunk));
	sockets = calloc((size_t)given->connections, sizeof(*sockets));
	if (epoll < 0 || !sockets)
		die("epoll_create1");
	for (at = 0; at < given->connections; at++) {
		sockets[at] = open_stream(given);
		watch(epoll, sockets[at], EPOLLOUT, (uint64_t)sockets[at]);
	}
	started();
	begin = now_ns();
	push(epoll, begin + (uint64_t)(given->seconds * NS));
	for (at = 0; at < given->connections; at++)
		send_end(sockets[at]);
	for (at = 0; at < given->connections; at++) {
		uint64_t counted;
		receive(sockets[at], &counted, sizeof(counted));
		bytes += counted;
	}
	printf("{\"event\": \"done\", \"bytes\": %llu, \"seconds\": %.6f, \"errors\": 0}\n", (unsigned long long)bytes,
	       (double)(now_ns() - begin) / NS);
	fflush(stdout);
}
