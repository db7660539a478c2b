/* What a flow carried, from the counters of TCP at its end. Pure, like steer.h: plain `cc` compiles it.
 *
 * tcp_sock.bytes_acked and bytes_received (RFC 4898) count sequence numbers, and SYN and FIN take one each
 * (net/ipv4/tcp_input.c, tcp_snd_una_update and tcp_rcv_nxt_update). The SYN that answers a connect() is not counted.
 */
#ifndef UNDERPASS_ENDING_H
#define UNDERPASS_ENDING_H

#include "flow.h"

#define ENDING_INLINE static inline __attribute__((always_inline))

/* include/net/tcp_states.h */
enum tcp_state {
	STATE_ESTABLISHED = 1,
	STATE_SYN_SENT = 2,
	STATE_FIN_WAIT1 = 4,
	STATE_FIN_WAIT2 = 5,
	STATE_CLOSED = 7,
	STATE_CLOSE_WAIT = 8,
	STATE_LAST_ACK = 9,
	STATE_CLOSING = 11,
};

/* `una` and `nxt`: the oldest sequence number without acknowledgement, and the next to send. */
ENDING_INLINE __u64 bytes_sent(__u64 acked, __u8 state, __u32 una, __u32 nxt)
{
	__u64 fin = state == STATE_FIN_WAIT2 || ((state == STATE_CLOSING || state == STATE_LAST_ACK) && una == nxt);
	return acked > 1 + fin ? acked - 1 - fin : 0;
}

/* From FIN_WAIT2 a socket is closed by the server's FIN, by a reset, or because its application has gone and waits for
 * no FIN: there the FIN counts only if it was seen and nothing of the stream before it is missing. */
ENDING_INLINE __u64 bytes_received(__u64 received, __u8 state, __u32 nxt, const struct flow *flow)
{
	__u64 fin = state == STATE_CLOSE_WAIT || state == STATE_LAST_ACK || state == STATE_CLOSING ||
		    (flow->fin && flow->fin_end == nxt);
	return received > fin ? received - fin : 0;
}

#endif
