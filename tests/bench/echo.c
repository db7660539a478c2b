/* echo ADDRESS:PORT: sends back what comes, or counts it (see bench.h). One thread, one epoll.
 * `echo ADDRESS:PORT deaf` only listens and never accepts: something to connect() to that costs nothing. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKLOG 4096
#define BUFFER (1 << 20)
#define MOST_FDS 65536

static struct client {
	char kind; /* 0: nothing heard yet */
	uint64_t counted;
} clients[MOST_FDS];

static char buffer[BUFFER];
static int epoll;

static int listen_at(const char *address)
{
	struct sockaddr_in at;
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (parse_address(address, &at))
		die("expected ADDRESS:PORT");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof(at)) || listen(fd, BACKLOG))
		die("listen");
	return fd;
}

static void accept_all(int listener)
{
	int one = 1, fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		if (fd >= MOST_FDS) {
			close(fd);
			continue;
		}
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		clients[fd] = (struct client){0};
		watch(epoll, fd, EPOLLIN, (uint64_t)fd);
	}
}

/* The client of an echo never has more out than fits into the buffers of its connection, so a short write is an error. */
static int answer(int fd, ssize_t got)
{
	struct client *one = &clients[fd];

	if (!one->kind) {
		one->kind = buffer[0];
		if (one->kind == SINK && send(fd, buffer, 1, MSG_NOSIGNAL) != 1)
			return -1;
	}
	one->counted += (uint64_t)got;
	if (one->kind == SINK) {
		int ended = buffer[got - 1] == SINK_END;
		return ended && send(fd, &one->counted, sizeof(one->counted), MSG_NOSIGNAL) != sizeof(one->counted) ? -1 : 0;
	}
	return send(fd, buffer, (size_t)got, MSG_NOSIGNAL) == got ? 0 : -1;
}

static void serve(int fd)
{
	ssize_t got = recv(fd, buffer, sizeof(buffer), 0);

	if (got < 0 && errno == EAGAIN)
		return;
	if (got > 0 && !answer(fd, got))
		return;
	close(fd);
}

int main(int count, char **arguments)
{
	struct epoll_event events[MAX_EVENTS];
	int listener, at, ready;

	if (count < 2)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	listener = listen_at(arguments[1]);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	if (count < 3)
		watch(epoll, listener, EPOLLIN, 0);
	printf("{\"event\": \"listening\"}\n");
	fflush(stdout);
	for (;;) {
		ready = epoll_wait(epoll, events, MAX_EVENTS, -1);
		for (at = 0; at < ready; at++)
			if (events[at].data.u64)
				serve((int)events[at].data.u64);
			else
				accept_all(listener);
	}
}
