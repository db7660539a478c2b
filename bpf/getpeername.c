/* cgroup/getpeername4 and 6, which accept() asks too: the client sees the address it dialled, the server its client. */
#include "names.h"

int getpeername4(struct bpf_sock_addr *ctx)
{
	struct flow *flow = socket_flows.sk_storage_get(ctx->sk, 0, 0);
	if (flow && flow->role == FLOW_CAPTURED)
		answer4(ctx, &flow->original, flow->original_port);
	if (flow && flow->role == FLOW_SERVED && is_known(&flow->source))
		answer4(ctx, &flow->source, flow->source_port);
	return 1;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	struct flow *flow = socket_flows.sk_storage_get(ctx->sk, 0, 0);
	if (flow && flow->role == FLOW_CAPTURED)
		answer6(ctx, &flow->original, flow->original_port);
	if (flow && flow->role == FLOW_SERVED && is_known(&flow->source))
		answer6(ctx, &flow->source, flow->source_port);
	return 1;
}
