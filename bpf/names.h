/* Which address a socket answers with in place of the proxy's; shared by the getpeername and getsockname hooks. */
#ifndef UNDERPASS_NAMES_H
#define UNDERPASS_NAMES_H

#include "maps.h"
#include "address.h"

/* An AF_INET socket cannot be shown a native IPv6 address; it keeps the proxy's. */
static __always_inline void answer4(struct bpf_sock_addr *ctx, const struct address *address, u16 port)
{
	if (!is_mapped(address))
		return;
	ctx->user_ip4 = ((const u32 *)address->bytes)[3];
	ctx->user_port = bpf_htons(port);
}

static __always_inline void answer6(struct bpf_sock_addr *ctx, const struct address *address, u16 port)
{
	const u32 *words = (const u32 *)address->bytes;
	ctx->user_ip6[0] = words[0];
	ctx->user_ip6[1] = words[1];
	ctx->user_ip6[2] = words[2];
	ctx->user_ip6[3] = words[3];
	ctx->user_port = bpf_htons(port);
}

#endif
