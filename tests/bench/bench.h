/* What the modes of the load generator and the echo server share. */
#ifndef BENCH_H
#define BENCH_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdint.h>

/* The first byte of a connection says what the server does with it: send everything back, or swallow everything. A sink
 * answers the first byte at once, and the last one, which is another, with the count of all bytes (8 bytes, this
 * machine's order). A half-close would say the same, but not every proxy carries it. */
#define ECHO 'E'
#define SINK 'S'
#define SINK_END 'X'

#define MAX_EVENTS 256
#define MAX_SIZE 65536 /* of a request: it must fit into an empty socket buffer */
#define NS 1000000000ull
#define SILENCE_MS 5000 /* of all connections at once: then somebody is stuck */

struct options {
	struct sockaddr_in to;
	int connections;
	int size;
	int rate;  /* requests a second, all connections together */
	int count; /* of connects */
	double seconds;
	double warmup;
};

uint64_t now_ns(void);
void die(const char *what) __attribute__((noreturn)); /* says errno too; 0 means the peer ended */
int parse_address(const char *text, struct sockaddr_in *to);
int dial(const struct sockaddr_in *to);       /* a connected non-blocking socket, or it dies */
int begin_dial(const struct sockaddr_in *to); /* -1 and errno when it cannot even begin */
void watch(int epoll, int fd, uint32_t events, uint64_t data);
void rewatch(int epoll, int fd, uint32_t events, uint64_t data);
void started(void); /* tells the reader of standard output that what is measured begins */

/* Every latency is kept, so that percentiles are values that were really measured. */
void record(uint64_t ns);
void forget_samples(void);
void print_done(double seconds, uint64_t errors);

void run_rr(const struct options *given);
void run_fixed(const struct options *given);
void run_cps(const struct options *given);
void run_bulk(const struct options *given);
void run_idle(const struct options *given);
void run_connect(const struct options *given);

#endif
