/* New connections: connect, one request, its reply, close; `connections` of them at a time. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST_ERRORS 100 /* of one run: then there is nothing to measure */

struct visit {
	int fd;
	int missing; /* bytes of the reply; 0 while still connecting */
	uint64_t from;
};

static struct visit *all;
static int epoll;
static uint64_t errors;
static char request[MAX_SIZE], reply[MAX_SIZE];

static void begin_visit(const struct options *given, int at)
{
	struct visit *one = &all[at];

	one->from = now_ns();
	one->missing = 0;
	one->fd = begin_dial(&given->to);
	if (one->fd < 0)
		die("connect");
	watch(epoll, one->fd, EPOLLOUT, (uint64_t)at);
}

static void send_request(const struct options *given, int at)
{
	struct visit *one = &all[at];

	if (send(one->fd, request, (size_t)given->size, MSG_NOSIGNAL) != given->size)
		return; /* EPOLLERR comes, or it is there already: fail() has the reason */
	one->missing = given->size;
	rewatch(epoll, one->fd, EPOLLIN, (uint64_t)at);
}

static void fail(const struct options *given, int at, int number)
{
	errors++;
	errno = number;
	if (errors > MOST_ERRORS)
		die("too many connections failed, the last with");
	close(all[at].fd);
	begin_visit(given, at);
}

static int pending_error(int fd)
{
	int number = 0;
	socklen_t size = sizeof(number);

	getsockopt(fd, SOL_SOCKET, SO_ERROR, &number, &size);
	return number;
}

static void step(const struct options *given, int at, uint32_t events)
{
	struct visit *one = &all[at];
	ssize_t got;

	if (!one->missing) {
		int number = pending_error(one->fd);
		if (number || (events & (EPOLLERR | EPOLLHUP)))
			fail(given, at, number);
		else
			send_request(given, at);
		return;
	}
	got = recv(one->fd, reply, sizeof(reply), 0);
	if (got < 0 && errno == EAGAIN)
		return;
	if (got <= 0 || got > one->missing) {
		fail(given, at, got < 0 ? errno : 0);
		return;
	}
	one->missing -= (int)got;
	if (one->missing)
		return;
	record(now_ns() - one->from);
	close(one->fd);
	begin_visit(given, at);
}

void run_cps(const struct options *given)
{
	struct epoll_event events[MAX_EVENTS];
	uint64_t now = now_ns(), begin = now + (uint64_t)(given->warmup * NS), end = begin + (uint64_t)(given->seconds * NS);
	int at, ready, measuring = 0;

	memset(request, ECHO, sizeof(request));
	epoll = epoll_create1(EPOLL_CLOEXEC);
	all = calloc((size_t)given->connections, sizeof(*all));
	if (epoll < 0 || !all)
		die("epoll_create1");
	for (at = 0; at < given->connections; at++)
		begin_visit(given, at);
	while (now < end) {
		ready = epoll_wait(epoll, events, MAX_EVENTS, SILENCE_MS);
		if (!ready) {
			errno = ETIMEDOUT;
			die("no reply on any connection");
		}
		now = now_ns();
		if (!measuring && now >= begin) {
			forget_samples();
			started();
			measuring = 1;
			begin = now;
			end = begin + (uint64_t)(given->seconds * NS);
		}
		for (at = 0; at < ready; at++)
			step(given, (int)events[at].data.u64, events[at].events);
	}
	print_done((double)(now - begin) / NS, errors);
}
