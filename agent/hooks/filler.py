"""From snapshot, cgroups and routes to the content of the kernel's tables, each worked out only when it changed."""

from __future__ import annotations

from collections.abc import Mapping

from agent import bpfcall, host, netlink, records
from agent.config import Config
from agent.hooks import local, revoke, tables
from agent.identity import Caller, IdentityRule, identify, with_uids
from agent.records import Address
from agent.snapshot import Snapshot
from policy.compile import Table
from policy.identity import SpiffeId
from policy.model import Policy

_ZERO = bytes(4)


class Filler:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._rules: tuple[IdentityRule, ...] = ()
        self._table: Table | None = None
        self._policy: Policy | None = None
        self._replaced: tuple[Table | None, Policy | None] = (None, None)  # and not yet looked at by cut()
        self._cgroups: Mapping[int, str] = {}
        self._callers: dict[int, tables.Entries] = {}  # by cgroup
        self._sources: dict[Address, Address | None] = {}
        self._local: frozenset[local.Spot] = frozenset()  # may be dialled directly
        self._maps: dict[str, bpfcall.Map] = {}
        self._kernel: tables.Tables | None = None

    @property
    def is_filled(self) -> bool:
        """Whether there was a snapshot to fill the tables from."""
        return self._table is not None

    def use(self, maps: dict[str, bpfcall.Map]) -> None:
        self._maps = maps
        self._kernel = tables.Tables(maps["services"], maps["callers"], maps["verdicts"])

    def take(self, snapshot: Snapshot) -> list[str]:
        """Apply a snapshot; remarks. Raises Invalid or Problem, and then everything stays as it was."""
        before = self._rules, self._table, self._callers, self._sources, self._local
        policy = tables.read_policy(snapshot)
        try:
            self._rules = _rules(self._config)
            self._table = tables.read_snapshot(snapshot, self._config.host, self._config.trust_domain, self._rules)
            self._sources = _sources(self._table)
            self._callers = {}
            self._local = frozenset()  # until all that is new is in place, and then only what look() finds
            remarks = self.write()
            self._replaced, self._policy = (before[1], self._policy), policy
            return remarks
        except BaseException:
            self._rules, self._table, self._callers, self._sources, self._local = before
            raise

    def cut(self) -> int:
        """End the direct connections that the policy taken last does not allow any more; how many. To be called after
        the tables are written: whoever was cut and dials again is refused. OSError when the kernel cannot."""
        (table, policy), self._replaced = self._replaced, (None, None)
        if table is None or policy == self._policy:
            return 0
        connections = netlink.sockets(netlink.CONNECTED)
        domain = self._config.trust_domain
        found = revoke.revoked(connections, table, policy, self._policy, domain, self._identity)
        return sum(map(netlink.destroy, found))

    def see(self, cgroups: Mapping[int, str]) -> bool:
        """Whether a cgroup came or went since the last time."""
        changed = cgroups.keys() != self._cgroups.keys()
        self._cgroups = cgroups
        return changed

    def ask_routes(self) -> bool:
        """Whether the address that this host uses toward a service has changed."""
        sources = _sources(self._table) if self._table else {}
        changed = sources != self._sources
        self._sources = sources
        return changed

    def look(self) -> bool:
        """See who listens at the endpoints of this host; whether there is another one now that may be dialled directly,
        or one that may not any more. OSError when the kernel does not say; renew() must not follow then."""
        wanted = local.candidates(self._table, self._config.host)
        wanted = local.here(wanted, netlink.local_addresses({address for address, _ in wanted})) if wanted else {}
        found = frozenset(wanted)
        if wanted and self._config.check_listeners:
            found = local.verified(wanted, netlink.sockets(netlink.LISTEN), self._identity)
        changed = found != self._local
        self._local = found
        return changed

    def renew(self) -> None:
        """Tell the kernel that what the tables say about direct connections has just been verified."""
        if self._local and self._maps:
            until = host.boottime_ns() + local.LEASE_NS
            self._maps["leases"].update(_ZERO, records.LEASE.pack(until))

    def _identity(self, cgroup: int, uid: int) -> SpiffeId | None:
        path = self._cgroups.get(cgroup)
        if path is None:
            return None
        files = tables.unknown_files(self._rules)
        found = identify(self._rules, Caller(path, uid), self._config.host, self._config.trust_domain, files)
        return found if isinstance(found, SpiffeId) else None

    def write(self) -> list[str]:
        """Make the kernel's tables what they should be; remarks. Nothing to do before there are maps and a snapshot."""
        if self._kernel is None or self._table is None:
            return []
        content = tables.Content(
            services=tables.service_entries(self._table, self._sources, self._local),
            callers=self._all_callers(self._table),
            verdicts=tables.verdict_entries(self._table),
        )
        content, remarks = tables.fit(content, self._size("callers"), self._size("verdicts"))
        self._kernel.write(content, self._size("services"))
        return remarks

    def _size(self, name: str) -> int:
        return bpfcall.map_info(self._maps[name].fd).max_entries

    def _all_callers(self, table: Table) -> tables.Entries:
        ids = tables.caller_ids(table)
        known = self._callers  # a cgroup never changes its path
        self._callers = {
            number: known[number] if number in known else tables.caller_entries(number, path, self._rules, ids)
            for number, path in self._cgroups.items()
        }
        return {key: value for entries in self._callers.values() for key, value in entries.items()}


def _rules(config: Config) -> tuple[IdentityRule, ...]:
    names = {rule.match.uid for rule in config.identities if isinstance(rule.match.uid, str)}
    found = {name: host.user_id(name) for name in names}
    return with_uids(config.identities, {name: uid for name, uid in found.items() if uid is not None})


def _sources(table: Table) -> dict[Address, Address | None]:
    return {address: host.source_address(address) for address in tables.addresses(table)}
