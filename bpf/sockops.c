/* sockops: hand the flow from the socket that dials to the socket that accepts, under the 4-tuple they share; account
 * for a flow that goes directly. */
#include "maps.h"
#include "address.h"
#include "ending.h"

#define IPV4 2
#define TCP_FLAG_FIN 1

static __always_inline void load_tuple(struct bpf_sock_ops *ctx, struct tuple *tuple, int dialled)
{
	struct address local, remote;
	u16 local_port = ctx->local_port;
	u16 remote_port = bpf_ntohl(ctx->remote_port);

	load_v6(&local, ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]);
	load_v6(&remote, ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3]);
	/* For an IPv6 socket that talks IPv4 the kernel fills in the IPv4 fields first; only they are complete here. */
	if (ctx->family == IPV4 || is_mapped(&remote)) {
		load_v4(&local, ctx->local_ip4);
		load_v4(&remote, ctx->remote_ip4);
	}
	__builtin_memset(tuple, 0, sizeof(*tuple));
	tuple->netns = bpf_get_netns_cookie(ctx);
	tuple->source = dialled ? local : remote;
	tuple->destination = dialled ? remote : local;
	tuple->source_port = dialled ? local_port : remote_port;
	tuple->destination_port = dialled ? remote_port : local_port;
}

static __always_inline int dials(const struct flow *flow)
{
	return flow->role == FLOW_CAPTURED || flow->role == FLOW_DELIVERED;
}

static __always_inline void call_again(struct bpf_sock_ops *ctx, int flag)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | flag);
}

/* TCP_CONNECT: the source port is chosen and the SYN not yet sent, so the entry is there before anyone can accept. */
static __always_inline void publish(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tuple tuple, place;
	struct flow *flow;

	if (!sk)
		return;
	flow = socket_flows.sk_storage_get(sk, 0, 0);
	if (flow && flow->role == FLOW_DIRECT)
		call_again(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
	if (!flow || !dials(flow))
		return;
	load_tuple(ctx, &tuple, 1);
	if (flow->role == FLOW_CAPTURED)
		flow->source_port = tuple.source_port;
	load_place(&place, bpf_get_socket_cookie(ctx));
	flows.delete(&place);
	if (flows.update(&tuple, flow)) {
		/* Another CPU took the place just freed. The proxy will find no flow and refuse. */
		flows.delete(&tuple);
		count(EXIT_PUBLISH_FAILED);
		return;
	}
	count(EXIT_PUBLISHED);
	call_again(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* PASSIVE_ESTABLISHED: runs before accept() can return the socket. */
static __always_inline void take(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tuple tuple;
	struct flow *flow, *kept;

	if (!sk)
		return;
	load_tuple(ctx, &tuple, 0);
	flow = flows.lookup(&tuple);
	if (!flow)
		return;
	kept = socket_flows.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (kept) {
		*kept = *flow;
		kept->role = flow->role == FLOW_CAPTURED ? FLOW_ACCEPTED : FLOW_SERVED;
		count(EXIT_TAKEN);
	} else {
		count(EXIT_PUBLISH_FAILED); /* no memory: the entry reached nobody */
	}
	flows.delete(&tuple);
}

/* A connect that never succeeded, or the orderly end of one whose other side these programs do not see (a server in
 * another namespace): nobody will take the entry, and left there it would fill the table. Other states leave it alone:
 * an application may connect, send and abort before the other side of the handshake has run. In these the other side
 * has acknowledged our FIN, so it has run. */
static __always_inline void withdraw(u32 before, struct tuple *tuple)
{
	if (before != STATE_SYN_SENT && before != STATE_FIN_WAIT2 && before != STATE_LAST_ACK &&
	    before != STATE_CLOSING)
		return;
	if (!flows.delete(tuple))
		count(EXIT_WITHDRAWN);
}

static __always_inline void tell_closing(struct bpf_sock_ops *ctx, const struct flow *flow, const struct tuple *tuple)
{
	struct closing *closing;
	u8 state = ctx->args[0];

	closing = closes.ringbuf_reserve(sizeof(*closing));
	if (!closing) {
		count(EXIT_EVENT_LOST);
		return;
	}
	__builtin_memset(closing, 0, sizeof(*closing));
	closing->at_ns = bpf_ktime_get_boot_ns();
	closing->started_ns = flow->started_ns;
	closing->connected_ns = flow->connected_ns;
	closing->cookie = flow->cookie;
	closing->cgroup = flow->cgroup;
	closing->bytes_sent = bytes_sent(ctx->bytes_acked, state, ctx->snd_una, ctx->snd_nxt);
	closing->bytes_received = bytes_received(ctx->bytes_received, state, ctx->rcv_nxt, flow);
	closing->original = flow->original;
	closing->source = tuple->source;
	closing->uid = flow->uid;
	closing->pid = flow->pid;
	closing->caller = flow->caller;
	closing->service = flow->service;
	closing->rule = flow->rule;
	closing->rtt_us = ctx->srtt_us >> 3; /* the kernel keeps eighths */
	closing->retransmits = ctx->total_retrans;
	closing->original_port = flow->original_port;
	closing->source_port = tuple->source_port;
	closing->state = state;
	closes.ringbuf_submit(closing, 0);
}

/* A direct flow has no proxy to account for it. */
static __always_inline void follow(struct bpf_sock_ops *ctx, struct flow *flow)
{
	if (ctx->args[1] == STATE_ESTABLISHED)
		flow->connected_ns = bpf_ktime_get_boot_ns();
	if (ctx->args[1] == STATE_FIN_WAIT1) /* from here on see_fin() has to see every segment */
		call_again(ctx, BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG);
}

/* The tuple is loaded in one place for both kinds of flow: with two, clang shares the loads behind a pointer into the
 * context, and the kernel (6.18) answers "dereference of modified ctx ptr". */
static __always_inline void change(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tuple tuple;
	struct flow *flow;
	int direct;

	if (!sk)
		return;
	flow = socket_flows.sk_storage_get(sk, 0, 0);
	direct = flow && flow->role == FLOW_DIRECT;
	if (ctx->args[1] != STATE_CLOSED) {
		if (flow && direct)
			follow(ctx, flow);
		return;
	}
	load_tuple(ctx, &tuple, 1);
	if (flow && direct) {
		tell_closing(ctx, flow, &tuple);
		socket_flows.sk_storage_delete(sk); /* it ends once */
	} else {
		withdraw(ctx->args[0], &tuple);
	}
}

/* PARSE_HDR_OPT: a segment, before TCP looks at it. The header is there up to skb_data_end, the data is not. */
static __always_inline void see_fin(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	u8 *header = ctx->skb_data;
	struct flow *flow;

	if (!sk || !(ctx->skb_tcp_flags & TCP_FLAG_FIN) || (void *)(header + 20) > (void *)ctx->skb_data_end)
		return;
	flow = socket_flows.sk_storage_get(sk, 0, 0);
	if (!flow || flow->role != FLOW_DIRECT)
		return;
	flow->fin_end = bpf_ntohl(*(u32 *)(header + 4)) + ctx->skb_len - (header[12] >> 4) * 4 + 1;
	flow->fin = 1;
}

int sockops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		publish(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		take(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		change(ctx);
		break;
	case BPF_SOCK_OPS_PARSE_HDR_OPT_CB:
		see_fin(ctx);
		break;
	}
	return 1;
}
