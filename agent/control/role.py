"""The control role's loop: keep the snapshot current, hand it out, write outcomes down, answer the admin API."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agent import channel, host, runstate
from agent.admin.server import AdminServer
from agent.audit.writer import Writer
from agent.bpfcall import Map
from agent.certs.issuer import Issuer
from agent.config import Config
from agent.control import lastgood, sources
from agent.control.closings import outcome_of_closing
from agent.control.leaves import Leaves
from agent.control.refusals import outcome_of
from agent.metrics import CONTENT_TYPE, Metrics
from agent.outcome import Outcome, to_json
from agent.records import Exit, unpack_closing, unpack_refusal
from agent.ring import Ring
from agent.route import Routes
from agent.snapshot import Snapshot, encode
from policy.compile import Table
from policy.fields import Invalid
from policy.identity import SpiffeId

log = logging.getLogger("underpass.control")

T = TypeVar("T")
Tell = Callable[[T, Table | None, str, float, Routes | None], Outcome]

TICK_S = 1.0
MAX_MESSAGES_PER_WAKE = 512


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the supervisor hands to control. `orders` are the channels to the other roles, by name."""

    status: socket.socket
    orders: dict[str, socket.socket]
    outcomes: socket.socket
    refusals: int
    closes: int
    exits: int
    admin: socket.socket  # listening


class Control:
    def __init__(self, config: Config, issuer: Issuer, roots_pem: bytes, inherited: Inherited, writer: Writer) -> None:
        self._config = config
        self._given = inherited
        self._writer = writer
        self._roots = roots_pem.decode()
        self._metrics = Metrics(config.report_open_every)
        names = dict.fromkeys(rule.application for rule in config.identities)
        self._identities = [SpiffeId(config.trust_domain, config.host, name) for name in names]
        self._leaves = Leaves(issuer, self._identities, log.error)
        self._refusals = Ring(inherited.refusals)
        self._closes = Ring(inherited.closes)
        self._exits = Map(inherited.exits)
        self._texts: sources.Texts | None = None  # in force
        self._seen: sources.Texts | None = None  # read last, in force or not
        self._snapshot: Snapshot | None = None
        self._compiled: sources.Compiled | None = None
        self._last_good = Path(config.state_dir) / "control" / "last-good.json"
        self._behind: set[str] = set()  # roles that have not got the current snapshot yet
        self._ready_told = False
        self._problem = ""
        self._reloads = {"success": 0, "failure": 0}
        self._stop = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._tick)
        server = AdminServer(self._status, self._render, CONTENT_TYPE)
        await server.start(self._given.admin, f"{self._config.run_dir}/control/admin.sock")
        self._read_when_ready(loop, self._given.outcomes, self._outcomes)
        self._read_when_ready(loop, self._given.status, self._from_supervisor)
        for name, orders in self._given.orders.items():
            self._read_when_ready(loop, orders, lambda name=name: self._order(name))  # type: ignore[misc]
        self._tick()  # the rings hold ids, and only policy and services know their names
        for ring, step in ((self._given.refusals, self._refused), (self._given.closes, self._closed)):
            loop.add_reader(ring, step)
            step()  # what happened while no control was there
        while not self._stop.is_set():
            self._tick()
            try:
                await asyncio.wait_for(self._stop.wait(), TICK_S)
            except TimeoutError:
                continue
        await server.stop()
        self._writer.close()
        return 0

    def _read_when_ready(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, step: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                step()
            except ConnectionResetError:
                loop.remove_reader(sock.fileno())
                self._stop.set()  # the supervisor is gone; its successor brings its own control

        loop.add_reader(sock.fileno(), guarded)

    # The snapshot

    def _tick(self) -> None:
        self._reload()
        if self._leaves.renew(time.time()) or self._snapshot is None:
            self._replace()
        self._hand_out()
        channel.send(self._given.status, {"type": "beat"})
        if self._snapshot is not None and not self._ready_told:
            self._ready_told = channel.send(self._given.status, {"type": "ready"})

    def _reload(self) -> None:
        try:
            texts = sources.read(self._config.policy, self._config.services)
            if texts == self._seen:
                return
            self._seen = texts
            self._accept(texts)
        except (OSError, ValueError) as error:
            if not isinstance(error, Invalid):
                self._seen = None  # it could not be read; once it can be again, it counts as new
            self._reject(sources.problem_line(error))
        else:
            self._problem = ""
            self._keep_on_disk(texts)

    def _keep_on_disk(self, texts: sources.Texts) -> None:
        try:
            lastgood.save(self._last_good, texts)
        except OSError as error:
            log.error("cannot keep the last good policy in %s: %s", self._last_good, error.strerror)

    def _reject(self, problem: str) -> None:
        if self._texts is None:
            self._fall_back()
        if problem != self._problem:
            self._problem = problem
            self._reloads["failure"] += 1
            kept = "the last good one stays in force" if self._texts else "nothing is allowed until it is mended"
            log.error("%s; %s", problem, kept)

    def _accept(self, texts: sources.Texts) -> None:
        self._compiled = sources.compiled(texts, self._config.trust_domain, self._identities)
        self._texts = texts
        self._reloads["success"] += 1
        self._replace()

    def _fall_back(self) -> None:
        texts = lastgood.load(self._last_good)
        if texts is None:
            return
        try:
            self._accept(texts)
            log.warning("started with the last good policy and services, kept in %s", self._last_good)
        except ValueError as error:
            log.error("%s is not usable: %s", self._last_good, error)

    def _replace(self) -> None:
        """A new generation from what is known now; without policy and services there is none, and nobody gets in."""
        if self._texts is None:
            return
        generation = self._snapshot.generation + 1 if self._snapshot else int(time.time() * 1000)
        self._snapshot = Snapshot(
            generation, self._texts.policies, self._texts.services, self._roots, self._leaves.texts()
        )
        self._metrics.generation.set(generation)
        for identity, expiry in self._leaves.expiries().items():
            self._metrics.leaf_expiry.labels(identity).set(expiry)
        self._behind = set(self._given.orders)
        log.info("snapshot %d from %d policy files", generation, len(self._texts.policies))

    def _hand_out(self) -> None:
        if self._snapshot is None:
            return
        for name in sorted(self._behind):
            snapshot = self._snapshot.without_keys() if name == "hooks" else self._snapshot
            if channel.send(self._given.orders[name], {"type": "snapshot"}, encode(snapshot)):
                self._behind.discard(name)

    def _order(self, name: str) -> None:
        while (message := channel.receive(self._given.orders[name])) is not None:
            if message[0].get("type") == "hello":
                self._behind.add(name)
                self._hand_out()

    def _from_supervisor(self) -> None:
        while channel.receive(self._given.status) is not None:
            pass  # nothing is sent this way; only its end matters

    # Outcomes

    def _outcomes(self) -> None:
        for _ in range(MAX_MESSAGES_PER_WAKE):
            message = channel.receive(self._given.outcomes)
            if message is None:
                return
            self._record(message[0]["outcome"])

    def _refused(self) -> None:
        for raw in self._refusals.read():
            record = unpack_refusal(raw)
            self._record(to_json(self._told(outcome_of, record, record.at_ns)))

    def _closed(self) -> None:
        for raw in self._closes.read():
            record = unpack_closing(raw)
            self._record(to_json(self._told(outcome_of_closing, record, record.at_ns)))

    def _told(self, make: Tell[T], record: T, at: int) -> Outcome:
        """The outcome of what the kernel told, at `at` of its clock."""
        wall = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + at / 1e9
        table, routes = (self._compiled.table, self._compiled.routes) if self._compiled else (None, None)
        return make(record, table, self._config.host, wall, routes)

    def _record(self, fields: dict[str, Any]) -> None:
        self._writer.write(fields)
        self._metrics.observe(fields)

    # The admin API

    def _status(self) -> dict[str, Any]:
        state = runstate.read(self._config.run_dir)
        snapshot = self._snapshot
        return {
            **state,
            "ready": state["ready"] and snapshot is not None,
            "host": self._config.host,
            "generation": snapshot.generation if snapshot else None,
            "problem": self._problem,
            "leaves": self._leaves.expiries(),
            "audit_lines": {"written": self._writer.written, "lost": self._writer.lost},
        }

    def _render(self) -> bytes:
        metrics, leaves = self._metrics, self._leaves
        metrics.total("kernel_exits", "Ways out of the kernel programs.", "exit", self._exit_totals())
        lines = {"written": self._writer.written, "lost": self._writer.lost}
        metrics.total("audit_lines", "Outcome lines, by fate.", "fate", lines)
        metrics.total(
            "leaf_rotations", "Leaf certificates.", "result", {"success": leaves.issued, "failure": leaves.failures}
        )
        metrics.total("policy_reloads", "Reloads of policy and services.", "result", self._reloads)
        self._measure_roles()
        return metrics.render()

    def _exit_totals(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for exit_ in Exit:
            raw = self._exits.lookup(int(exit_).to_bytes(4, "little")) or b""
            totals[exit_.name.lower()] = sum(int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8))
        return totals

    def _measure_roles(self) -> None:
        roles = runstate.read(self._config.run_dir)["roles"]
        usages = {name: host.usage(role["pid"]) for name, role in roles.items() if role["pid"]}
        known = {name: usage for name, usage in usages.items() if usage is not None}
        self._metrics.total(
            "role_cpu_seconds", "CPU time of each process.", "role", {name: cpu for name, (_, cpu) in known.items()}
        )
        for count, text in (("lost_outcomes", "Outcomes that control did not take."), ("defects", "Defects met.")):
            self._metrics.total(count, text, "role", {name: role.get(count, 0) for name, role in roles.items()})
        for name, (resident, _) in known.items():
            self._metrics.resident.labels(name).set(resident)
