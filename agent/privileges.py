"""Giving up what a role does not need, for good: capabilities, user, and the way back to them."""

from __future__ import annotations

import ctypes
import os
import pwd
import struct

CAP_DAC_READ_SEARCH, CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 2, 12, 19, 21, 38, 39

# hooks: BPF and cgroup programs; PTRACE and READ_SEARCH to tell who a caller is (/proc/PID/exe, open_by_handle_at);
# SYS_ADMIN because bcc opens adopted maps by id (BPF_MAP_GET_FD_BY_ID asks for it).
HOOKS = frozenset({CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN})

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_KEEPCAPS = 24, 38, 8
_VERSION_3 = 0x20080522
_LIBC = ctypes.CDLL(None, use_errno=True)


def drop_to(keep: frozenset[int]) -> None:
    """Stay the same user with only these capabilities (capset(2), PR_CAPBSET_DROP in prctl(2))."""
    for capability in range(_last_capability() + 1):
        if capability not in keep:
            _prctl(_PR_CAPBSET_DROP, capability)
    _set_capabilities(keep)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def become(user: str) -> None:
    """Become an account without any capability. KeyError when there is no such account."""
    account = pwd.getpwnam(user)
    for capability in range(_last_capability() + 1):
        _prctl(_PR_CAPBSET_DROP, capability)
    os.setgroups([])
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    _set_capabilities(frozenset())
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _set_capabilities(keep: frozenset[int]) -> None:
    mask = sum(1 << capability for capability in keep)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("=IIIIII", low, low, 0, high, high, 0))
    if _LIBC.capset(header, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _prctl(option: int, argument: int) -> None:
    if _LIBC.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _last_capability() -> int:
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        return int(file.read())
