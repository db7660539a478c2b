"""The connecting side: what is captured, what is refused, and what the application sees of it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from contextlib import closing
from ipaddress import ip_address
from multiprocessing.connection import Connection
from typing import Any

import pytest

from agent import records
from agent.records import Exit, Flow, Refusal, Role, VerdictKind
from agent.ring import Ring
from tests.host.conftest import NewKernel
from tests.host.kernel_fixture import CAPTURE_PORT, V4, V6, Child, Kernel

Names = tuple[Any, Any]


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def connect(address: str, port: int) -> Names | int:
    """Names of a fresh connection, or the errno it failed with."""
    with socket.socket(family_of(address)) as sock:
        try:
            sock.connect((address, port))
        except OSError as error:
            return error.errno or -1
        return sock.getpeername()[:2], sock.getsockname()[:2]


def proxy(kernel: Kernel, count: int = 1, address: str = "127.0.0.1", listen: bool = True) -> Child:
    """Stands for the proxy: takes `count` connections and tells the flow of each."""

    def body(talk: Connection) -> list[Flow | None]:
        with socket.create_server((address, CAPTURE_PORT), family=family_of(address), backlog=64) as listener:
            kernel.mark(listener)
            talk.send("listening")
            flows = []
            for _ in range(count):
                accepted, _peer = listener.accept()
                flows.append(kernel.note(accepted))
                accepted.close()
            return flows

    child = kernel.start(body, "agent")
    assert child.receive() == "listening"
    return child


def refusals(kernel: Kernel) -> list[Refusal]:
    with closing(Ring(kernel.map("refusals").fd)) as ring:
        return [records.unpack_refusal(record) for record in ring.read()]


def moved(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


@pytest.mark.parametrize(
    ("dialled", "listening"),
    [(V4, "127.0.0.1"), (f"::ffff:{V4}", "127.0.0.1"), (V6, "::1")],
    ids=["v4", "mapped", "v6"],
)
def test_a_protected_connect_arrives_at_the_proxy_with_its_flow(kernel: Kernel, dialled: str, listening: str) -> None:
    plain = dialled.removeprefix("::ffff:")
    kernel.protect(plain, 2000, service=7, source=plain)
    started = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    far = proxy(kernel, address=listening)
    client = kernel.start(lambda _talk: connect(dialled, 2000))
    peer, own = client.result()
    (flow,) = far.result()
    assert peer == (dialled, 2000), "getpeername answers what was dialled"
    assert own == (dialled, flow.source_port), "getsockname answers what the server will see"
    assert (flow.role, flow.original, flow.original_port) == (Role.ACCEPTED, ip_address(plain), 2000)
    assert (flow.source, flow.service, flow.caller) == (ip_address(plain), 7, records.CALLER_UNKNOWN)
    assert (flow.cgroup, flow.uid, flow.pid) == (kernel.cgroup_id("app"), 0, client.pid)
    assert started < flow.started_ns < time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert kernel.flows() == []


def test_a_socket_bound_to_an_address_appears_under_it(kernel: Kernel) -> None:
    kernel.protect(V4, 2001, source=None)

    def client() -> Names:
        with socket.create_connection((V4, 2001), source_address=(V4, 0)) as sock:
            return sock.getpeername(), sock.getsockname()

    far = proxy(kernel)
    _peer, own = kernel.run(client)
    (flow,) = far.result()
    assert own == (V4, flow.source_port)
    assert flow.source == ip_address(V4)


def test_an_unprotected_port_is_left_alone(kernel: Kernel) -> None:
    def server(talk: Connection) -> Any:
        with socket.create_server((V4, 2002)) as listener:
            talk.send("listening")
            return listener.accept()[1]

    kernel.protect(V4, 2003)
    far = kernel.start(server, "server")
    far.receive()
    peer, own = kernel.run(lambda: connect(V4, 2002))
    assert peer == (V4, 2002)
    assert far.result() == own


def test_nobody_listening_refuses_the_connect_and_leaves_no_entry(kernel: Kernel) -> None:
    kernel.protect(V4, 2004)
    before = kernel.exits()
    assert kernel.run(lambda: connect(V4, 2004)) == errno.ECONNREFUSED
    assert moved(before, kernel.exits()) == {"no_proxy": 1}
    assert kernel.flows() == []


def test_a_denied_connect_fails_with_eperm_and_is_told(kernel: Kernel) -> None:
    kernel.protect(V4, 2005, service=2005)
    kernel.judge(2005, VerdictKind.DENY, rule=4711, caller=500)
    refusals(kernel)
    before = kernel.exits()
    client = kernel.start(lambda _talk: connect(V4, 2005))
    assert client.result() == errno.EPERM
    (refusal,) = refusals(kernel)
    assert (refusal.rule, refusal.service, refusal.caller, refusal.exit) == (4711, 2005, 500, Exit.DENIED)
    assert (refusal.original, refusal.original_port, refusal.pid) == (ip_address(V4), 2005, client.pid)
    assert (refusal.cgroup, refusal.uid) == (kernel.cgroup_id("app"), 0)
    assert refusal.command
    assert moved(before, kernel.exits()) == {"denied": 1}
    assert kernel.flows() == []


def test_a_denied_mapped_and_v6_connect_fail_as_well(kernel: Kernel) -> None:
    kernel.protect(V4, 2006, service=2006)
    kernel.protect(V6, 2006, service=2006)
    kernel.judge(2006, VerdictKind.DENY, rule=1)
    assert kernel.run(lambda: connect(f"::ffff:{V4}", 2006)) == errno.EPERM
    assert kernel.run(lambda: connect(V6, 2006)) == errno.EPERM


def test_a_verdict_for_one_user_does_not_judge_another(kernel: Kernel) -> None:
    kernel.protect(V4, 2007, service=2007)
    kernel.judge(2007, VerdictKind.DENY, rule=1, caller=600)
    here = kernel.cgroup_id("app")
    kernel.map("callers").update(records.caller_key(here, 0), bytes(4))  # root: the proxy is asked

    def as_user() -> Names | int:
        os.setuid(1234)
        return connect(V4, 2007)

    far = proxy(kernel)
    assert kernel.run(as_user) == errno.EPERM
    assert kernel.run(lambda: connect(V4, 2007))[0] == (V4, 2007)
    (flow,) = far.result()
    assert flow.caller == records.CALLER_UNKNOWN
    kernel.map("callers").delete(records.caller_key(here, 0))


def test_an_unavailable_service_refuses_with_econnrefused(kernel: Kernel) -> None:
    kernel.protect(V4, 2008, service=2008)
    kernel.judge(2008, VerdictKind.UNAVAILABLE, rule=0)
    refusals(kernel)
    before = kernel.exits()
    assert kernel.run(lambda: connect(V4, 2008)) == errno.ECONNREFUSED
    assert moved(before, kernel.exits()) == {"unavailable": 1}
    assert [refusal.exit for refusal in refusals(kernel)] == [Exit.UNAVAILABLE]


def test_an_unknown_caller_is_captured_for_the_proxy_to_decide(kernel: Kernel) -> None:
    """`server` is a cgroup that no table knows."""
    kernel.protect(V4, 2009, service=2009)
    kernel.map("verdicts").update(
        records.verdict_key(records.CALLER_NOBODY, 2009), records.verdict_value(VerdictKind.DENY, 1)
    )
    far = proxy(kernel)
    peer, _own = kernel.run(lambda: connect(V4, 2009), "server")
    (flow,) = far.result()
    assert peer == (V4, 2009)
    assert (flow.caller, flow.cgroup) == (records.CALLER_UNKNOWN, kernel.cgroup_id("server"))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
def test_the_capture_port_cannot_be_dialled_directly(kernel: Kernel, address: str) -> None:
    before = kernel.exits()
    assert kernel.run(lambda: connect(address, CAPTURE_PORT)) == errno.EPERM
    assert moved(before, kernel.exits()) == {"loop": 1}


def test_the_agent_is_never_captured(kernel: Kernel) -> None:
    kernel.protect(V4, 2010, service=2010)
    kernel.judge(2010, VerdictKind.DENY, rule=1)
    before = kernel.exits()
    assert kernel.run(lambda: connect(V4, 2010), "agent") == errno.ECONNREFUSED, "nobody listens there"
    assert moved(before, kernel.exits()) == {"exempt": 1}


def test_another_network_namespace_is_not_rewritten(kernel: Kernel) -> None:
    kernel.protect(V4, 2011)
    other = kernel.new_netns()
    before = kernel.exits()
    assert kernel.run(lambda: connect(V4, 2011), netns=other) == errno.ECONNREFUSED
    assert moved(before, kernel.exits()) == {"other_netns": 1}


def test_udp_passes_and_is_counted(kernel: Kernel) -> None:
    kernel.protect(V4, 2012)

    def client() -> Any:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((V4, 2012))
            return sock.getpeername()

    before = kernel.exits()
    assert kernel.run(client) == (V4, 2012)
    assert moved(before, kernel.exits()) == {"not_tcp": 1}


def test_an_mptcp_connect_is_captured(kernel: Kernel) -> None:
    """Its names are the proxy's: the hooks for names see the MPTCP socket, and the note is on its first subflow."""
    kernel.protect(V4, 2013)

    def client() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as sock:
            sock.connect((V4, 2013))
            return "connected"

    far = proxy(kernel)
    assert kernel.run(client) == "connected"
    (flow,) = far.result()
    assert (flow.original, flow.original_port) == (ip_address(V4), 2013)


def test_a_socket_whose_captured_connect_failed_answers_honestly_for_the_next(kernel: Kernel) -> None:
    kernel.protect(V4, 2014)

    def server(talk: Connection) -> Any:
        with socket.create_server((V4, 2015)) as listener:
            talk.send("listening")
            return listener.accept()[1]

    def client() -> Any:
        with socket.socket() as sock:
            failed = sock.connect_ex((V4, 2014))
            sock.connect((V4, 2015))
            return failed, sock.getpeername(), sock.getsockname()

    far = kernel.start(server, "server")
    far.receive()
    failed, peer, own = kernel.run(client)
    assert failed == errno.ECONNREFUSED
    assert peer == (V4, 2015)
    assert own == far.result()


def test_a_socket_whose_captured_connect_failed_answers_honestly_after_a_refusal(kernel: Kernel) -> None:
    kernel.protect(V4, 2016, service=2016)
    kernel.protect(V4, 2017, service=2017)
    kernel.judge(2017, VerdictKind.DENY, rule=1)

    def client() -> Any:
        with socket.socket() as sock:
            return sock.connect_ex((V4, 2016)), sock.connect_ex((V4, 2017)), sock.getsockname()[0]

    assert kernel.run(client) == (errno.ECONNREFUSED, errno.EPERM, "0.0.0.0")


def test_a_thousand_connections_leave_no_entry(kernel: Kernel) -> None:
    kernel.protect(V4, 2018)

    def client() -> int:
        return sum(connect(V4, 2018)[0] == (V4, 2018) for _ in range(1000))  # type: ignore[index]

    before = kernel.exits()
    far = proxy(kernel, count=1000)
    assert kernel.run(client) == 1000
    flows = far.result()
    assert all(flow.original_port == 2018 for flow in flows)
    assert len({flow.cookie for flow in flows}) == 1000
    assert moved(before, kernel.exits()) == {"captured": 1000, "published": 1000, "taken": 1000}
    assert kernel.flows() == []


def test_a_connect_given_up_is_withdrawn(kernel: Kernel) -> None:
    """A listener with a full queue answers no SYN: the entry lives as long as the attempt."""
    kernel.protect(V4, 2019)

    def listener(talk: Connection) -> None:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", CAPTURE_PORT))
            sock.listen(0)
            kernel.mark(sock)
            talk.send("listening")
            talk.recv()

    def client() -> list[int]:
        socks = [socket.socket() for _ in range(4)]
        for sock in socks:
            sock.setblocking(False)
            sock.connect_ex((V4, 2019))
        time.sleep(0.2)
        during = len(kernel.flows())
        for sock in socks:
            sock.close()
        return [during, len(kernel.flows())]

    far = kernel.start(listener, "agent")
    far.receive()
    during, after = kernel.run(client)
    far.talk.send("enough")
    far.result()
    assert during > 0
    assert after == 0


def test_a_full_table_refuses_and_counts(new_kernel: NewKernel) -> None:
    kernel = new_kernel(max_flows=16)
    kernel.install()
    kernel.protect(V4, 2020)
    proxy(kernel)
    kernel.fill_flows()
    assert kernel.run(lambda: connect(V4, 2020)) == errno.EPERM
    assert kernel.exits()["full"] == 1
    assert [refusal.exit for refusal in refusals(kernel)] == [Exit.FULL]


def test_a_full_ring_loses_a_record_and_counts_it(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.install()
    kernel.protect(V4, 2021, service=2021)
    kernel.judge(2021, VerdictKind.DENY, rule=9)

    def client() -> set[Any]:
        return {connect(V4, 2021) for _ in range(3500)}

    assert kernel.run(client) == {errno.EPERM}, "losing an event never lets a connect pass"
    kept = refusals(kernel)
    exits = kernel.exits()
    assert exits["denied"] == 3500
    assert exits["event_lost"] == 3500 - len(kept) > 0
    assert all(refusal.rule == 9 for refusal in kept)
    kernel.run(lambda: connect(V4, 2021))
    assert len(refusals(kernel)) == 1, "once read, there is room again"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_whoever_takes_the_agents_port_is_given_nothing(kernel: Kernel, address: str) -> None:
    """While no agent runs any process can listen there: it must not be taken for the proxy."""
    dialled = V4 if address == "127.0.0.1" else V6
    kernel.protect(dialled, 2030)

    def thief(talk: Connection) -> bool:
        with socket.create_server((address, CAPTURE_PORT), family=family_of(address)) as listener:
            listener.settimeout(0.5)
            talk.send("listening")
            with contextlib.suppress(TimeoutError):
                listener.accept()
                return True
            return False

    far = kernel.start(thief, "server")
    far.receive()
    before = kernel.exits()
    assert kernel.run(lambda: connect(dialled, 2030)) == errno.ECONNREFUSED
    assert moved(before, kernel.exits()) == {"no_proxy": 1}
    assert far.result() is False
