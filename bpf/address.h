/* Addresses as 16 bytes in network order, IPv4 mapped. Pure, like steer.h: plain `cc` compiles it. */
#ifndef UNDERPASS_ADDRESS_H
#define UNDERPASS_ADDRESS_H

#include "flow.h"

#define ADDRESS_INLINE static inline __attribute__((always_inline))

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MAPPED_PREFIX 0xffff0000U
#else
#define MAPPED_PREFIX 0x0000ffffU
#endif

ADDRESS_INLINE void load_v4(struct address *address, __u32 ip_be)
{
	__u32 *words = (__u32 *)address->bytes;
	words[0] = 0;
	words[1] = 0;
	words[2] = MAPPED_PREFIX;
	words[3] = ip_be;
}

ADDRESS_INLINE void load_v6(struct address *address, __u32 a, __u32 b, __u32 c, __u32 d)
{
	__u32 *words = (__u32 *)address->bytes;
	words[0] = a;
	words[1] = b;
	words[2] = c;
	words[3] = d;
}

/* ::ffff:0:0/96 */
ADDRESS_INLINE int is_mapped(const struct address *address)
{
	const __u32 *words = (const __u32 *)address->bytes;
	return words[0] == 0 && words[1] == 0 && address->bytes[8] == 0 && address->bytes[9] == 0 &&
	       address->bytes[10] == 0xff && address->bytes[11] == 0xff;
}

ADDRESS_INLINE int is_loopback(const struct address *address)
{
	const __u32 *words = (const __u32 *)address->bytes;
	if (is_mapped(address))
		return address->bytes[12] == 127;
	return words[0] == 0 && words[1] == 0 && words[2] == 0 && address->bytes[12] == 0 && address->bytes[13] == 0 &&
	       address->bytes[14] == 0 && address->bytes[15] == 1;
}

/* 0.0.0.0 or :: (or ::ffff:0.0.0.0): no address. Linux connects such a destination to the loopback. */
ADDRESS_INLINE int is_unspecified(const struct address *address)
{
	const __u32 *words = (const __u32 *)address->bytes;
	return words[3] == 0 && words[0] == 0 && words[1] == 0 && (words[2] == 0 || words[2] == MAPPED_PREFIX);
}

ADDRESS_INLINE int is_known(const struct address *address)
{
	const __u64 *words = (const __u64 *)address->bytes;
	return words[0] || words[1];
}

/* The key of a reservation in `flows`: the dialling socket's cookie in namespace 0, which no real namespace has. */
ADDRESS_INLINE void load_place(struct tuple *place, __u64 cookie)
{
	__builtin_memset(place, 0, sizeof(*place));
	__builtin_memcpy(place->source.bytes, &cookie, sizeof(cookie));
}

#endif
