/* What the modes of the load generator and the echo server share. */
#ifndef BENCH_H
#define BENCH_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdint.h>

/* The first byte of a connection says what the server does with the rest: send all of it back, or swallow it. A sink
 * answers the first byte at once, and the end of the data with the count of all bytes. */
#define ECHO 'E'
#define SINK 'S'

#define MAX_EVENTS 256
#define NS 1000000000ull

struct options {
	struct sockaddr_in to;
	int connections;
	int size;
	int rate;       /* requests a second, all connections together */
	int count;
	int pause_us;
	double seconds;
	double warmup;
};

uint64_t now_ns(void);
void die(const char *what) __attribute__((noreturn)); /* says errno too */
int parse_address(const char *text, struct sockaddr_in *to);
int dial(const struct sockaddr_in *to);                  /* returns a connected, non-blocking socket, or dies */
int begin_dial(const struct sockaddr_in *to);            /* -1 and errno when it cannot even begin */
void watch(int epoll, int fd, uint32_t events, uint64_t data);
void rewatch(int epoll, int fd, uint32_t events, uint64_t data);
void started(void);                                      /* tells the reader of standard output that the window begins */

/* Every latency of a run, so that percentiles are values that were really measured. */
void record(uint64_t ns);
void forget_samples(void);
uint64_t samples(void);
void print_done(double seconds, uint64_t errors);        /* requests and percentiles */

void run_rr(const struct options *given);
void run_fixed(const struct options *given);
void run_cps(const struct options *given);
void run_bulk(const struct options *given);
void run_idle(const struct options *given);
void run_connect(const struct options *given);

#endif
