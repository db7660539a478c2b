/* Clock, sockets and samples. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FIRST_ROOM (1u << 16)
#define MOST_SAMPLES (1u << 25)
#define DIAL_MS 10000

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

int begin_dial(const struct sockaddr_in *to)
{
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
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
	int number = 0, fd = begin_dial(to);
	socklen_t size = sizeof(number);
	struct pollfd waiting = {.fd = fd, .events = POLLOUT};

	if (fd < 0 || poll(&waiting, 1, DIAL_MS) < 0)
		die("connect");
	getsockopt(fd, SOL_SOCKET, SO_ERROR, &number, &size);
	errno = waiting.revents ? number : ETIMEDOUT;
	if (errno)
		die("connect");
	return fd;
}

static void control(int epoll, int act, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = {.events = events, .data.u64 = data};

	if (epoll_ctl(epoll, act, fd, &event))
		die("epoll_ctl");
}

void watch(int epoll, int fd, uint32_t events, uint64_t data)
{
	control(epoll, EPOLL_CTL_ADD, fd, events, data);
}

void rewatch(int epoll, int fd, uint32_t events, uint64_t data)
{
	control(epoll, EPOLL_CTL_MOD, fd, events, data);
}

void started(void)
{
	printf("{\"event\": \"started\"}\n");
	fflush(stdout);
}

void record(uint64_t ns)
{
	if (count == room) {
		room = room ? room * 2 : FIRST_ROOM;
		if (room > MOST_SAMPLES || !(taken = realloc(taken, room * sizeof(*taken))))
			die("too many samples");
	}
	taken[count++] = ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

void forget_samples(void)
{
	count = 0;
}

static int compare(const void *left, const void *right)
{
	uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
	return (a > b) - (a < b);
}

/* Nearest rank, in microseconds. */
static double percentile(double percent)
{
	uint64_t rank = (uint64_t)((double)count * percent / 100.0 + 0.999999);
	return taken[rank ? rank - 1 : 0] / 1000.0;
}

void print_done(double seconds, uint64_t errors)
{
	if (count)
		qsort(taken, count, sizeof(*taken), compare);
	printf("{\"event\": \"done\", \"requests\": %llu, \"seconds\": %.6f, \"errors\": %llu", (unsigned long long)count,
	       seconds, (unsigned long long)errors);
	if (count)
		printf(", \"min_us\": %.3f, \"p50_us\": %.3f, \"p99_us\": %.3f, \"p999_us\": %.3f, \"max_us\": %.3f",
		       taken[0] / 1000.0, percentile(50), percentile(99), percentile(99.9), taken[count - 1] / 1000.0);
	printf("}\n");
	fflush(stdout);
}
