/* sockops: hand the flow from the socket that dials to the socket that accepts, under the 4-tuple they share. */
#include "maps.h"
#include "address.h"

#define IPV4 2
#define SYN_SENT 2
#define FIN_WAIT2 5
#define CLOSED 7
#define LAST_ACK 9
#define CLOSING 11

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

/* TCP_CONNECT: the source port is chosen and the SYN not yet sent, so the entry is there before anyone can accept. */
static __always_inline void publish(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tuple tuple, place;
	struct flow *flow;

	if (!sk)
		return;
	flow = socket_flows.sk_storage_get(sk, 0, 0);
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
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
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
static __always_inline int is_over(u32 before, u32 after)
{
	return after == CLOSED &&
	       (before == SYN_SENT || before == FIN_WAIT2 || before == LAST_ACK || before == CLOSING);
}

static __always_inline void withdraw(struct bpf_sock_ops *ctx)
{
	struct tuple tuple;

	if (!is_over(ctx->args[0], ctx->args[1]))
		return;
	load_tuple(ctx, &tuple, 1);
	if (!flows.delete(&tuple))
		count(EXIT_WITHDRAWN);
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
		withdraw(ctx);
		break;
	}
	return 1;
}
