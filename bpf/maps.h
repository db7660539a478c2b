/* The maps. PINS is the bpffs directory: a map found there is adopted with its content, else made and pinned.
 * MAX_FLOWS comes from the configuration. */
#ifndef UNDERPASS_MAPS_H
#define UNDERPASS_MAPS_H

#include "flow.h"

#define PINNED(type, name) type ":" PINS "/" #name

/* Flows between SYN and the end of the handshake, and reservations. Never an LRU: evicting a live entry would make
 * the proxy refuse an innocent connection; a full map refuses a new one in connect() and counts it. */
BPF_TABLE(PINNED("hash", flows), struct tuple, struct flow, flows, MAX_FLOWS);

/* The flow of a socket, freed with the socket by the kernel. */
struct socket_flows_table_t {
	int key;
	struct flow leaf;
	void *(*sk_storage_get)(void *, void *, int);
	int (*sk_storage_delete)(void *);
	u32 flags;
};
__attribute__((section("maps/" PINNED("sk_storage", socket_flows))))
struct socket_flows_table_t socket_flows = {.flags = BPF_F_NO_PREALLOC};
BPF_ANNOTATE_KV_PAIR(socket_flows, int, struct flow);

/* Written by agent/hooks from the policy; the kernel only reads them. */
BPF_F_TABLE(PINNED("lpm_trie", services), struct service_key, struct service, services, 32768, BPF_F_NO_PREALLOC);
BPF_F_TABLE(PINNED("hash", callers), struct caller_key, u32, callers, 16384, BPF_F_NO_PREALLOC);
BPF_F_TABLE(PINNED("hash", verdicts), struct verdict_key, struct verdict, verdicts, 65536, BPF_F_NO_PREALLOC);
BPF_TABLE(PINNED("array", settings), u32, struct settings, settings, 1);
BPF_TABLE(PINNED("array", leases), u32, struct lease, leases, 1);

BPF_TABLE(PINNED("percpu_array", exits), u32, u64, exits, EXIT_COUNT);

/* Refused connects on their way to the audit: 256 KiB hold about 3,200 of them. */
struct refusals_table_t {
	int key;
	u32 leaf;
	int (*ringbuf_output)(void *, u64, u64);
	void *(*ringbuf_reserve)(u64);
	void (*ringbuf_discard)(void *, u64);
	void (*ringbuf_submit)(void *, u64);
	u32 max_entries;
};
__attribute__((section("maps/" PINNED("ringbuf", refusals))))
struct refusals_table_t refusals = {.max_entries = 256 * 1024};

/* Direct flows that ended, about 7,700 in 1 MiB. A ring of its own: a caller that is refused in a loop must not cost
 * anybody else the record of a flow. */
struct closes_table_t {
	int key;
	u32 leaf;
	int (*ringbuf_output)(void *, u64, u64);
	void *(*ringbuf_reserve)(u64);
	void (*ringbuf_discard)(void *, u64);
	void (*ringbuf_submit)(void *, u64);
	u32 max_entries;
};
__attribute__((section("maps/" PINNED("ringbuf", closes))))
struct closes_table_t closes = {.max_entries = 1024 * 1024};

static __always_inline void count(u32 exit)
{
	u64 *counter = exits.lookup(&exit);
	if (counter)
		*counter += 1;
}

#endif
