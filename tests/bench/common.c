/* Clock, sockets and samples. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FIRST_ROOM (1u << 16)
#define MOST_SAMPLES (1u << 25)

static uint32_t *taken; /* nanoseconds; a latency over 4.29 s counts as 4.29 s */
static uint64_t count, room;

uint64_t now_ns(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * NS + (uint64_t)at.tv_nsec;
}

void die(const char *what)
{
	printf("{\"event\": \"error\", \"text\": \"%s: %s\"}\n", what, errno ? strerror(errno) : "the connection ended");
	fflush(stdout);
	_exit(1);
}

int parse_address(const char *text, struct sockaddr_in *to)
{
	char host[64];
	int port;
	memset(to, 0, sizeof(*to));
	to->sin_family = AF_INET;
	if (sscanf(text, "%63[0-9.]:%d", host, &port) != 2 || port < 1 || port > 65535)
		return -1;
	to->sin_port = htons((uint16_t)port);
	return inet_pton(AF_INET, host, &to->sin_addr) == 1 ? 0 : -1;
}

static void set_nodelay(int fd)
{
	int one = 1;
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		die("TCP_NODELAY");
}

int begin_dial(const struct sockaddr_in *to)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	set_nodelay(fd);
	if (connect(fd, (const struct sockaddr *)to, sizeof(*to)) && errno != EINPROGRESS) {
		int number = errno;
		close(fd);
		errno = number;
		return -1;
	}
	return fd;
}

int dial(const struct sockaddr_in *to)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		die("socket");
	if (connect(fd, (const struct sockaddr *)to, sizeof(*to)))
		die("connect");
	set_nodelay(fd);
	int flags = 1;
	/* accept4-like: one call, FIONBIO has no other flags to keep */
	if (ioctl_nonblock(fd, &flags))
		die("FIONBIO");
	return fd;
}
