/* The capture decision: pure, no map, no helper, so that plain `cc` compiles it and a table tests it without root. */
#ifndef UNDERPASS_STEER_H
#define UNDERPASS_STEER_H

#include "flow.h"

#define STEER_INLINE static inline __attribute__((always_inline))

enum act {
	ACT_PASS = 0,
	ACT_CAPTURE = 1,
	ACT_REFUSE_EPERM = 2,
	ACT_REFUSE_ECONNREFUSED = 3,
	ACT_DIRECT = 4, /* let it connect as it asked, and account for it */
};

/* What a hook found out before it decides. */
struct facts {
	__u8 configured;    /* settings.schema is ours */
	__u8 exempt;        /* the caller is the agent itself */
	__u8 own_netns;     /* the proxy listens in this network namespace */
	__u8 tcp;           /* a stream socket of TCP (or MPTCP, whose first subflow is one) */
	__u8 to_capture;    /* dials the proxy's capture listener itself */
	__u8 protected_;    /* the destination belongs to a service */
	__u8 verdict;       /* enum verdict_kind, VERDICT_ASK where the table has no entry */
	__u8 local;         /* the destination is marked as an endpoint of this host */
	__u8 fresh;         /* and somebody still verifies these marks */
};

struct steering {
	__u8 act;  /* enum act */
	__u8 exit; /* enum exit */
};

/* Loop guard first: the proxy's own sockets are never captured, whatever the tables say. */
STEER_INLINE int is_own_socket(const struct facts *facts)
{
	return facts->exempt;
}

STEER_INLINE struct steering steering(__u8 act, __u8 exit)
{
	struct steering result = {act, exit};
	return result;
}

STEER_INLINE struct steering steer(const struct facts *facts)
{
	if (!facts->configured)
		return steering(ACT_PASS, EXIT_UNPROTECTED);
	if (is_own_socket(facts))
		return steering(ACT_PASS, EXIT_EXEMPT);
	/* Another namespace's loopback has no proxy: rewriting there would only break the connection. */
	if (!facts->own_netns)
		return steering(ACT_PASS, EXIT_OTHER_NETNS);
	if (facts->to_capture)
		return steering(ACT_REFUSE_EPERM, EXIT_LOOP);
	if (!facts->protected_)
		return steering(ACT_PASS, EXIT_UNPROTECTED);
	if (!facts->tcp)
		return steering(ACT_PASS, EXIT_NOT_TCP);
	if (facts->verdict == VERDICT_DENY)
		return steering(ACT_REFUSE_EPERM, EXIT_DENIED);
	if (facts->verdict == VERDICT_UNAVAILABLE)
		return steering(ACT_REFUSE_ECONNREFUSED, EXIT_UNAVAILABLE);
	/* Nothing to protect from the wire, and both ends are known to the kernel. Unsure of either: through the proxy. */
	if (facts->verdict == VERDICT_ALLOW && facts->local && facts->fresh)
		return steering(ACT_DIRECT, EXIT_DIRECT);
	return steering(ACT_CAPTURE, EXIT_CAPTURED);
}

#endif
