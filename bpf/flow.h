/* Every map and event layout, once. agent/records.py mirrors the structs; a root test compares it with what bcc derives.
 *
 * Addresses are 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (RFC 4291 section 2.5.5.2), so that one layout and
 * one comparison serve both families. Ports are in host order unless a name ends in _be. Fields widest first, padding
 * explicit: hash keys are compared as bytes.
 */
#ifndef UNDERPASS_FLOW_H
#define UNDERPASS_FLOW_H

#define SCHEMA_VERSION 2 /* raise it when any layout below changes: pinned maps of another version are refused */

struct address {
	__u8 bytes[16];
};

/* Who holds the flow: the side that dialled publishes it under its 4-tuple, the side that accepts takes it. */
enum flow_role {
	FLOW_CAPTURED = 1,  /* on the application's socket, redirected to the proxy */
	FLOW_ACCEPTED = 2,  /* on the proxy's socket that accepted it */
	FLOW_DELIVERED = 3, /* on the proxy's socket that dials the application */
	FLOW_SERVED = 4,    /* on the application's socket that accepted it */
	FLOW_DIRECT = 5,    /* on the application's socket, which dials an application of this host itself */
	FLOW_LISTENER = 6,  /* on the agent's own capture listener, so that nobody else's is taken for it */
};

struct flow {
	__u64 cookie;            /* of the application's dialling socket; 0 for a delivered flow */
	__u64 cgroup;            /* id of the caller's cgroup */
	__u64 started_ns;        /* CLOCK_BOOTTIME at connect() */
	__u64 connected_ns;      /* direct flows only, as are the rule and the FIN: when it was established, 0 = not yet */
	struct address original; /* what the application dialled */
	struct address source;   /* what the application appears as; all zero = not known */
	__u32 uid;
	__u32 pid;               /* thread group id in the initial pid namespace */
	__u32 caller;            /* id from `callers`, 0 = not known to the kernel */
	__u32 service;           /* id from `services` */
	__u32 rule;              /* id of the rule that allowed it */
	__u32 fin_end;           /* sequence number behind the server's FIN */
	__u16 original_port;
	__u16 source_port;
	__u8 role;               /* enum flow_role */
	__u8 fin;                /* whether fin_end is known */
	__u8 pad[2];
};

struct tuple {
	__u64 netns; /* cookie of the network namespace; 0 = a reservation, see reserve() in connect.c */
	struct address source;
	struct address destination;
	__u16 source_port;
	__u16 destination_port;
	__u32 pad;
};

struct caller_key {
	__u64 cgroup;
	__u32 uid; /* ANY_UID when the rule names no uid */
	__u32 pad;
};
#define ANY_UID 0xffffffffU
#define CALLER_UNKNOWN 0U
#define CALLER_NOBODY 1U /* known, and without identity */

/* Longest-prefix key: the port is always matched whole, then the address. */
struct service_key {
	__u32 prefix_bits; /* 16 + bits of the address, mapped IPv4 counting from 96 */
	__u8 port_be[2];
	__u8 address[16];
	__u8 pad[2];
};

struct service {
	struct address source; /* the address this host uses towards the service; all zero = not known */
	__u32 id;
	__u8 local;            /* this very address and port is an endpoint of this host: see ACT_DIRECT in steer.h */
	__u8 pad[3];
};

/* How long the `local` marks hold. Whoever verifies them renews it; when nobody does, everything is tunnelled again. */
struct lease {
	__u64 until_ns; /* CLOCK_BOOTTIME */
};

struct verdict_key {
	__u32 caller;
	__u32 service;
};

enum verdict_kind {
	VERDICT_ASK = 0, /* the proxy decides */
	VERDICT_ALLOW = 1,
	VERDICT_DENY = 2,
	VERDICT_UNAVAILABLE = 3,
};

struct verdict {
	__u32 rule;
	__u8 kind; /* enum verdict_kind */
	__u8 pad[3];
};

struct settings {
	__u64 netns;         /* cookie of the proxy's network namespace */
	__u64 exempt_cgroup; /* the agent's own cgroup: its sockets are never captured */
	struct address capture_v4; /* where captured connections are sent */
	struct address capture_v6;
	__u32 exempt_level;  /* depth of exempt_cgroup below the cgroup root */
	__u32 schema;        /* SCHEMA_VERSION of whoever wrote this; 0 = nobody yet, nothing is captured */
	__u16 capture_port;
	__u16 pad[3];
};

/* One counter for each way out of a program. */
enum exit {
	EXIT_UNPROTECTED = 0,
	EXIT_EXEMPT,
	EXIT_OTHER_NETNS,
	EXIT_NOT_TCP,
	EXIT_CAPTURED,
	EXIT_DENIED,
	EXIT_UNAVAILABLE,
	EXIT_FULL,
	EXIT_LOOP,
	EXIT_EVENT_LOST,
	EXIT_PUBLISHED,
	EXIT_PUBLISH_FAILED,
	EXIT_TAKEN,
	EXIT_WITHDRAWN,
	EXIT_DIRECT,
	EXIT_NO_PROXY,
	EXIT_COUNT,
};

/* A refused connect(), for the audit. Never the base of a decision: a full ring loses it, and counts that. */
struct refusal {
	__u64 at_ns; /* CLOCK_BOOTTIME */
	__u64 cgroup;
	struct address original;
	__u32 uid;
	__u32 pid;
	__u32 caller;
	__u32 service;
	__u32 rule;
	__u16 original_port;
	__u16 exit; /* enum exit */
	char command[16];
};

/* The end of a direct flow, for the audit; lost and counted like a refusal when its ring is full. */
struct closing {
	__u64 at_ns; /* CLOCK_BOOTTIME, as the next two */
	__u64 started_ns;
	__u64 connected_ns; /* 0 = never */
	__u64 cookie;
	__u64 cgroup;
	__u64 bytes_sent;     /* and acknowledged */
	__u64 bytes_received;
	struct address original;
	struct address source;
	__u32 uid;
	__u32 pid;
	__u32 caller;
	__u32 service;
	__u32 rule;
	__u32 rtt_us;         /* smoothed */
	__u32 retransmits;
	__u16 original_port;
	__u16 source_port;
	__u8 state;           /* the state of TCP it ended from */
	__u8 pad[7];
};

#endif
