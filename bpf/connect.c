/* cgroup/connect4 and connect6: decide, note the flow on the socket, rewrite the destination to the proxy. */
#include "maps.h"
#include "steer.h"
#include "address.h"

#define RETURN_EPERM 0 /* what the kernel answers when a connect program returns 0 and sets nothing */
#define RETURN_PASS 1
#define ECONNREFUSED_ERRNO 111
#define TCP 6
#define MPTCP 262
#define STREAM 1

static __always_inline void load_service_key(struct service_key *key, const struct address *to, u16 port)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->prefix_bits = 16 + 128;
	key->port_be[0] = port >> 8;
	key->port_be[1] = port & 0xff;
	__builtin_memcpy(key->address, to->bytes, 16);
}

static __always_inline u32 find_caller(u64 cgroup, u32 uid)
{
	struct caller_key key = {.cgroup = cgroup, .uid = uid};
	u32 *caller = callers.lookup(&key);
	if (!caller) {
		key.uid = ANY_UID;
		caller = callers.lookup(&key);
	}
	return caller ? *caller : CALLER_UNKNOWN;
}

static __always_inline void tell_refusal(const struct flow *flow, u16 exit)
{
	struct refusal *refusal = refusals.ringbuf_reserve(sizeof(*refusal));
	if (!refusal) {
		count(EXIT_EVENT_LOST);
		return;
	}
	refusal->at_ns = flow->started_ns;
	refusal->cgroup = flow->cgroup;
	refusal->original = flow->original;
	refusal->uid = flow->uid;
	refusal->pid = flow->pid;
	refusal->caller = flow->caller;
	refusal->service = flow->service;
	refusal->rule = flow->rule;
	refusal->original_port = flow->original_port;
	refusal->exit = exit;
	bpf_get_current_comm(refusal->command, sizeof(refusal->command));
	refusals.ringbuf_submit(refusal, 0);
}

/* Takes the flow's place in `flows` before the connect goes on: in sockops it would be too late to refuse. publish()
 * turns it into the 4-tuple. */
static __always_inline int reserve(struct bpf_sock_addr *ctx, struct flow *flow)
{
	struct tuple place;
	load_place(&place, bpf_get_socket_cookie(ctx));
	return flows.update(&place, flow);
}

/* Notes the flow on the socket. A failure (no memory, map full) must refuse: an uncaptured connect would be plaintext,
 * and a direct one would be missing from the audit. */
static __always_inline int note(struct bpf_sock_addr *ctx, struct flow *flow)
{
	struct flow *kept;
	if (flow->role == FLOW_CAPTURED && reserve(ctx, flow)) /* a direct flow is handed to nobody */
		return -1;
	kept = socket_flows.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return -1;
	*kept = *flow;
	return 0;
}

/* The proxy delivers: its note has to reach the server's socket. Without a place the server would take the proxy for its
 * client, and an address it trusts for one that nobody meant: refuse as for a captured flow. */
static __always_inline int reserve_delivery(struct bpf_sock_addr *ctx)
{
	struct flow *kept = socket_flows.sk_storage_get(ctx->sk, 0, 0);
	if (!kept || kept->role != FLOW_DELIVERED)
		return 0;
	kept->started_ns = bpf_ktime_get_boot_ns();
	return reserve(ctx, kept);
}

/* The socket may carry the note of an earlier connect() that failed; its names must not answer for this one. */
static __always_inline void forget(struct bpf_sock_addr *ctx)
{
	socket_flows.sk_storage_delete(ctx->sk);
}

static __always_inline int is_fresh(u64 now)
{
	u32 zero = 0;
	struct lease *lease = leases.lookup(&zero);
	return lease && now < lease->until_ns;
}

/* What the tables say about this caller and this destination. */
static __always_inline void look_up(const struct address *to, u16 port, struct facts *facts, struct flow *flow)
{
	struct service_key service_key;
	struct verdict_key verdict_key;
	struct service *service;
	struct verdict *verdict;

	load_service_key(&service_key, to, port);
	service = services.lookup(&service_key);
	if (!service)
		return;
	facts->protected_ = 1;
	flow->started_ns = bpf_ktime_get_boot_ns();
	facts->local = service->local;
	facts->fresh = service->local && is_fresh(flow->started_ns);
	flow->service = service->id;
	flow->source = service->source;
	flow->caller = find_caller(flow->cgroup, flow->uid);
	verdict_key.caller = flow->caller;
	verdict_key.service = flow->service;
	verdict = verdicts.lookup(&verdict_key);
	if (!verdict)
		return;
	facts->verdict = verdict->kind;
	flow->rule = verdict->rule;
}

static __always_inline void load_facts(struct bpf_sock_addr *ctx, const struct settings *now, const struct address *to,
				       u16 port, struct facts *facts)
{
	facts->configured = now->schema == SCHEMA_VERSION;
	facts->exempt = bpf_get_current_ancestor_cgroup_id(now->exempt_level) == now->exempt_cgroup;
	facts->own_netns = bpf_get_netns_cookie(ctx) == now->netns;
	facts->tcp = ctx->type == STREAM && (ctx->protocol == TCP || ctx->protocol == MPTCP);
	facts->to_capture =
		ctx->type == STREAM && port == now->capture_port && (is_loopback(to) || is_unspecified(to));
}

/* While no agent runs, its port is free for any process of this host, which would be given what applications send in
 * the clear, and could answer in the server's name. So whoever listens there must carry the agent's mark. */
static __always_inline int proxy_listens(struct bpf_sock_addr *ctx, const struct settings *now, const struct address *to)
{
	struct bpf_sock_tuple there = {};
	struct bpf_sock *listener;
	struct flow *mark;
	int ours;

	if (is_mapped(to)) {
		there.ipv4.daddr = ((const u32 *)now->capture_v4.bytes)[3];
		there.ipv4.dport = bpf_htons(now->capture_port);
		listener = bpf_sk_lookup_tcp(ctx, &there, sizeof(there.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(there.ipv6.daddr, now->capture_v6.bytes, 16);
		there.ipv6.dport = bpf_htons(now->capture_port);
		listener = bpf_sk_lookup_tcp(ctx, &there, sizeof(there.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!listener)
		return 0;
	mark = socket_flows.sk_storage_get(listener, 0, 0);
	ours = mark && mark->role == FLOW_LISTENER;
	bpf_sk_release(listener);
	return ours;
}

static __always_inline u8 pass(struct bpf_sock_addr *ctx, u8 exit)
{
	if (exit == EXIT_EXEMPT && reserve_delivery(ctx)) {
		count(EXIT_FULL);
		return ACT_REFUSE_EPERM;
	}
	if (exit != EXIT_EXEMPT) /* the proxy's own note tells whom it delivers */
		forget(ctx);
	count(exit);
	return ACT_PASS;
}

static __always_inline int is_flow(u8 act)
{
	return act == ACT_CAPTURE || act == ACT_DIRECT;
}

static __always_inline u8 decide(struct bpf_sock_addr *ctx, const struct address *to, const struct address *bound, u16 port)
{
	u32 zero = 0;
	struct facts facts = {};
	struct flow flow = {};
	struct steering steering;
	struct settings *settings_ = settings.lookup(&zero);

	if (!settings_)
		return ACT_PASS; /* cannot be: an array map always has its one entry */
	flow.cgroup = bpf_get_current_cgroup_id();
	flow.uid = (u32)bpf_get_current_uid_gid();
	load_facts(ctx, settings_, to, port, &facts);
	look_up(to, port, &facts, &flow);
	steering = steer(&facts);
	if (steering.act == ACT_PASS)
		return pass(ctx, steering.exit);
	if (!flow.started_ns)
		flow.started_ns = bpf_ktime_get_boot_ns();
	flow.cookie = bpf_get_socket_cookie(ctx);
	flow.original = *to;
	flow.original_port = port;
	flow.pid = bpf_get_current_pid_tgid() >> 32;
	flow.role = steering.act == ACT_DIRECT ? FLOW_DIRECT : FLOW_CAPTURED;
	if (!is_unspecified(bound)) /* the application chose its source address itself */
		flow.source = *bound;
	if (steering.act == ACT_CAPTURE && !proxy_listens(ctx, settings_, to)) {
		steering.act = ACT_REFUSE_ECONNREFUSED;
		steering.exit = EXIT_NO_PROXY;
	}
	if (is_flow(steering.act) && note(ctx, &flow)) {
		steering.act = ACT_REFUSE_EPERM;
		steering.exit = EXIT_FULL;
	}
	count(steering.exit);
	if (!is_flow(steering.act)) {
		forget(ctx);
		tell_refusal(&flow, steering.exit);
	}
	return steering.act;
}

static __always_inline int refuse(u8 act)
{
	if (act == ACT_REFUSE_ECONNREFUSED)
		bpf_set_retval(-ECONNREFUSED_ERRNO);
	return RETURN_EPERM;
}

int connect4(struct bpf_sock_addr *ctx)
{
	u32 zero = 0;
	struct address to, bound;
	struct settings *settings_;
	u8 act;

	load_v4(&to, ctx->user_ip4);
	load_v4(&bound, ctx->sk->src_ip4);
	act = decide(ctx, &to, &bound, bpf_ntohs(ctx->user_port));
	if (act == ACT_PASS || act == ACT_DIRECT)
		return RETURN_PASS;
	settings_ = settings.lookup(&zero);
	if (act != ACT_CAPTURE || !settings_)
		return refuse(act);
	ctx->user_ip4 = ((u32 *)settings_->capture_v4.bytes)[3];
	ctx->user_port = bpf_htons(settings_->capture_port);
	return RETURN_PASS;
}

/* An IPv4-mapped destination goes to the proxy's IPv4 address: an IPv6-only address would change what is on the wire. */
int connect6(struct bpf_sock_addr *ctx)
{
	u32 zero = 0;
	struct address to, bound;
	struct settings *settings_;
	const u32 *words;
	u8 act;

	load_v6(&to, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	load_v6(&bound, ctx->sk->src_ip6[0], ctx->sk->src_ip6[1], ctx->sk->src_ip6[2], ctx->sk->src_ip6[3]);
	act = decide(ctx, &to, &bound, bpf_ntohs(ctx->user_port));
	if (act == ACT_PASS || act == ACT_DIRECT)
		return RETURN_PASS;
	settings_ = settings.lookup(&zero);
	if (act != ACT_CAPTURE || !settings_)
		return refuse(act);
	words = (const u32 *)(is_mapped(&to) ? settings_->capture_v4.bytes : settings_->capture_v6.bytes);
	ctx->user_ip6[0] = words[0];
	ctx->user_ip6[1] = words[1];
	ctx->user_ip6[2] = words[2];
	ctx->user_ip6[3] = words[3];
	ctx->user_port = bpf_htons(settings_->capture_port);
	return RETURN_PASS;
}
