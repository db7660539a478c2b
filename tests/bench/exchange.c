/* Requests and replies on connections that stay: closed loop, or at a fixed rate. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

struct exchange {
	int fd;
	int missing;   /* bytes of the reply; 0 while no request is out */
	uint64_t from; /* the time its latency counts from */
};

static struct exchange *all;
static char request[MAX_SIZE], reply[MAX_SIZE];

static int open_all(const struct options *given)
{
	int at, epoll = epoll_create1(EPOLL_CLOEXEC);

	memset(request, ECHO, sizeof(request));
	all = calloc((size_t)given->connections, sizeof(*all));
	if (epoll < 0 || !all)
		die("epoll_create1");
	for (at = 0; at < given->connections; at++) {
		all[at].fd = dial(&given->to);
		watch(epoll, all[at].fd, EPOLLIN, (uint64_t)at);
	}
	return epoll;
}

static void ask(struct exchange *one, int size, uint64_t from)
{
	ssize_t sent = send(one->fd, request, (size_t)size, MSG_NOSIGNAL);

	if (sent != size) {
		errno = sent < 0 ? errno : ENOBUFS;
		die("send");
	}
	one->missing = size;
	one->from = from;
}

static void silence(void)
{
	errno = ETIMEDOUT;
	die("no reply on any connection");
}

/* 1 when the reply is complete. */
static int hear(struct exchange *one)
{
	ssize_t got = recv(one->fd, reply, sizeof(reply), 0);

	if (got < 0 && errno == EAGAIN)
		return 0;
	if (got <= 0 || got > one->missing) {
		errno = got < 0 ? errno : got ? EPROTO : 0;
		die("recv");
	}
	one->missing -= (int)got;
	return one->missing == 0;
}

void run_rr(const struct options *given)
{
	struct epoll_event events[MAX_EVENTS];
	int at, ready, measuring = 0, epoll = open_all(given);
	uint64_t now = now_ns(), begin = now + (uint64_t)(given->warmup * NS), end = begin + (uint64_t)(given->seconds * NS);

	for (at = 0; at < given->connections; at++)
		ask(&all[at], given->size, now);
	while (now < end) {
		ready = epoll_wait(epoll, events, MAX_EVENTS, SILENCE_MS);
		if (!ready)
			silence();
		now = now_ns();
		if (!measuring && now >= begin) {
			forget_samples();
			started();
			measuring = 1;
			begin = now = now_ns();
			end = begin + (uint64_t)(given->seconds * NS);
		}
		for (at = 0; at < ready; at++) {
			struct exchange *one = &all[events[at].data.u64];
			if (!hear(one))
				continue;
			now = now_ns();
			record(now - one->from);
			ask(one, given->size, now);
		}
	}
	print_done((double)(now - begin) / NS, 0);
}

/* Request number i is due at start + i / rate, on connection i modulo N. A connection that is still busy sends it after
 * its reply, and its latency counts from when it was due: a proxy that stalls must not be spared by a client that waits. */
struct schedule {
	uint64_t start, gap; /* gap: between two requests of all connections */
	uint64_t issued;     /* requests that have become due */
	uint64_t *owed;      /* by connection: the next of its requests that is not sent yet */
	int connections, size;
};

static uint64_t due(const struct schedule *plan, uint64_t request_number)
{
	return plan->start + request_number * plan->gap;
}

static void send_next(struct schedule *plan, int at)
{
	if (!all[at].missing && plan->owed[at] < plan->issued) {
		ask(&all[at], plan->size, due(plan, plan->owed[at]));
		plan->owed[at] += (uint64_t)plan->connections;
	}
}

static void issue(struct schedule *plan, uint64_t now)
{
	while (due(plan, plan->issued) <= now) {
		plan->issued++;
		send_next(plan, (int)((plan->issued - 1) % (uint64_t)plan->connections));
	}
}

void run_fixed(const struct options *given)
{
	struct epoll_event events[MAX_EVENTS];
	int at, ready, measuring = 0, epoll = open_all(given);
	struct schedule plan = {.start = now_ns(), .gap = NS / (uint64_t)given->rate, .connections = given->connections,
				.size = given->size, .owed = calloc((size_t)given->connections, sizeof(uint64_t))};
	uint64_t now = plan.start, begin = now + (uint64_t)(given->warmup * NS), end = begin + (uint64_t)(given->seconds * NS);
	uint64_t heard = now;

	if (!plan.owed)
		die("calloc");
	for (at = 0; at < given->connections; at++)
		plan.owed[at] = (uint64_t)at;
	while ((now = now_ns()) < end) {
		if (!measuring && now >= begin) {
			forget_samples();
			started();
			measuring = 1;
		}
		if (now - heard > SILENCE_MS * (NS / 1000))
			silence();
		issue(&plan, now);
		now = now_ns();
		uint64_t left = due(&plan, plan.issued) > now ? due(&plan, plan.issued) - now : 0;
		struct timespec wait = {.tv_sec = (time_t)(left / NS), .tv_nsec = (long)(left % NS)};
		ready = epoll_pwait2(epoll, events, MAX_EVENTS, &wait, NULL);
		for (at = 0; at < ready; at++) {
			int which = (int)events[at].data.u64;
			if (!hear(&all[which]))
				continue;
			heard = now_ns();
			record(heard - all[which].from);
			send_next(&plan, which);
		}
	}
	print_done((double)(now - begin) / NS, 0);
}
