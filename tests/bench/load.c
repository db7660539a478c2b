/* load MODE to=ADDRESS:PORT [connections=N] [size=N] [seconds=T] [warmup=T] [rate=N] [count=N]
 *
 * One thread, one epoll. Each line of standard output is a JSON object: "started" when what is measured begins, then
 * "done" with the figures, or "error" instead of either. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define MOST_SECONDS 60
#define PATIENCE_S 30 /* beyond the run itself: whoever hangs must end, too */

static const struct mode {
	const char *name;
	void (*run)(const struct options *);
} modes[] = {
	{"rr", run_rr},	    /* closed loop of requests on N connections */
	{"fixed", run_fixed},   /* an open-loop schedule; latency counts from the scheduled time */
	{"cps", run_cps},	    /* connect, one request, close; N at a time */
	{"bulk", run_bulk},	    /* N streams in one direction; until the server has counted the last byte */
	{"idle", run_idle},	    /* open N connections, one request each, hold them until standard input ends */
	{"connect", run_connect}, /* how long connect() itself takes, N times */
};

static void usage(const char *problem)
{
	fprintf(stderr, "load: %s\n", problem);
	exit(2);
}

static int number(const char *text, int least, int most)
{
	char *end;
	long value = strtol(text, &end, 10);
	if (*end || end == text || value < least || value > most)
		usage("a number is out of range");
	return (int)value;
}

static double seconds(const char *text)
{
	char *end;
	double value = strtod(text, &end);
	if (*end || end == text || !(value >= 0 && value <= MOST_SECONDS))
		usage("seconds are out of range");
	return value;
}

static void set(struct options *given, const char *key, const char *value)
{
	if (!strcmp(key, "to") && !parse_address(value, &given->to))
		return;
	if (!strcmp(key, "connections"))
		given->connections = number(value, 1, 20000);
	else if (!strcmp(key, "size"))
		given->size = number(value, 1, MAX_SIZE);
	else if (!strcmp(key, "rate"))
		given->rate = number(value, 1, 100000);
	else if (!strcmp(key, "count"))
		given->count = number(value, 1, 20000);
	else if (!strcmp(key, "seconds"))
		given->seconds = seconds(value);
	else if (!strcmp(key, "warmup"))
		given->warmup = seconds(value);
	else
		usage("unknown option, or a wrong address");
}

int main(int count, char **arguments)
{
	struct options given = {.connections = 1, .size = 200, .rate = 1000, .count = 1000, .seconds = 1, .warmup = 0.1};
	int at;

	if (count < 3)
		usage("expected: MODE to=ADDRESS:PORT [key=value]...");
	for (at = 2; at < count; at++) {
		char *value = strchr(arguments[at], '=');
		if (!value)
			usage("expected key=value");
		*value = 0;
		set(&given, arguments[at], value + 1);
	}
	if (!given.to.sin_port)
		usage("to=ADDRESS:PORT is missing");
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_TIMERSLACK, 1);
	alarm((unsigned)(given.seconds + given.warmup) + PATIENCE_S);
	for (at = 0; at < (int)(sizeof(modes) / sizeof(modes[0])); at++)
		if (!strcmp(arguments[1], modes[at].name)) {
			modes[at].run(&given);
			return 0;
		}
	usage("unknown mode");
}
