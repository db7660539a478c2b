/* Connections that do nothing, and connect() that is all there is. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define AT_A_TIME 32 /* requests out: a proxy's listen queue is not what is measured */

static char request[MAX_SIZE], reply[MAX_SIZE];

static int open_one(const struct options *given, int epoll)
{
	int fd = dial(&given->to);

	if (send(fd, request, (size_t)given->size, MSG_NOSIGNAL) != given->size)
		die("send");
	watch(epoll, fd, EPOLLIN, (uint64_t)fd);
	return fd;
}

/* How many replies came. One request each, so that the whole way of every connection exists. */
static int hear(const struct options *given, int epoll)
{
	struct epoll_event events[MAX_EVENTS];
	int at, ready = epoll_wait(epoll, events, MAX_EVENTS, 10000);

	if (ready == 0) {
		errno = ETIMEDOUT;
		die("no answer");
	}
	for (at = 0; at < ready; at++) {
		int fd = (int)events[at].data.u64;
		ssize_t got = recv(fd, reply, sizeof(reply), MSG_WAITALL);
		errno = got < 0 ? errno : 0;
		if (got != given->size)
			die("recv");
		epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL);
	}
	return ready;
}

/* Opens for `seconds` at most: what is told is how many there are. */
void run_idle(const struct options *given)
{
	int opened = 0, answered = 0, epoll = epoll_create1(EPOLL_CLOEXEC);
	uint64_t begin = now_ns(), end = begin + (uint64_t)(given->seconds * NS);
	char byte;

	memset(request, ECHO, sizeof(request));
	if (epoll < 0)
		die("epoll_create1");
	while (opened < given->connections && now_ns() < end) {
		open_one(given, epoll);
		opened++;
		while (opened - answered >= AT_A_TIME)
			answered += hear(given, epoll);
	}
	while (answered < opened)
		answered += hear(given, epoll);
	alarm(0); /* whoever reads decides how long */
	started();
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	printf("{\"event\": \"done\", \"requests\": %d, \"seconds\": %.6f, \"errors\": 0}\n", opened,
	       (double)(now_ns() - begin) / NS);
	fflush(stdout);
}

void run_connect(const struct options *given)
{
	uint64_t begin = now_ns();
	int at;

	started();
	for (at = 0; at < given->count; at++) {
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		uint64_t before = now_ns();
		if (fd < 0 || connect(fd, (const struct sockaddr *)&given->to, sizeof(given->to)))
			die("connect");
		record(now_ns() - before);
		close(fd);
	}
	print_done((double)(now_ns() - begin) / NS, 0);
}
