/* cgroup/getsockname4 and 6: a captured client sees the address the server will see, not the loopback it really uses. */
#include "names.h"

int getsockname4(struct bpf_sock_addr *ctx)
{
	struct flow *flow = socket_flows.sk_storage_get(ctx->sk, 0, 0);
	if (flow && flow->role == FLOW_CAPTURED && flow->source_port && is_known(&flow->source))
		answer4(ctx, &flow->source, flow->source_port);
	return 1;
}

int getsockname6(struct bpf_sock_addr *ctx)
{
	struct flow *flow = socket_flows.sk_storage_get(ctx->sk, 0, 0);
	if (flow && flow->role == FLOW_CAPTURED && flow->source_port && is_known(&flow->source))
		answer6(ctx, &flow->source, flow->source_port);
	return 1;
}
