"""Real applications do their work: psql, pgbench, a payment terminal, the laboratory in both directions."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

from tests.apps.terminal import PAN
from tests.demo.claims import Claims, expect
from tests.demo.postgres import program
from tests.demo.stage import LAB_PORT, POSTGRES_PORT, SWITCH_PORT, listening, next_line
from tests.world import place
from tests.world.enter import Place
from tests.world.host import Host
from tests.world.place import PYTHON
from tests.world.world import World

SQL_MARK = "underpass-may-not-show-this"
SQL = f"select inet_client_addr(), inet_server_addr(), inet_server_port(), '{SQL_MARK}'"
EXCHANGES = 600
CLIENTS, TRANSACTIONS = 4, 50

# What must not be found on the wire: text of the query, of pgbench's own, a card number, a merchant of ISO 8583.
NEEDLES = [SQL_MARK.encode(), b"pgbench_accounts", b"inet_client_addr", PAN.encode(), b"UNDERPASSBANK01"]


def run_terminal(world: World, where: Place, exchanges: int) -> dict[str, Any]:
    to = f"{world.b.v4}:{SWITCH_PORT}"
    return _json(where, [PYTHON, "-m", "tests.apps.terminal", "--connect", to, "--count", str(exchanges)])


def show_applications(world: World, claims: Claims) -> None:
    claims.check("psql works and the server sees host a's address", lambda: _psql(world))
    claims.check("a client sees the server's address in getpeername and its own in getsockname", lambda: _names(world))
    claims.check("pgbench fills its tables and runs its transactions", lambda: _pgbench(world))


def show_lab(world: World, claims: Claims) -> None:
    for family in ("IPv4", "IPv6"):
        for here, there in ((world.a, world.b), (world.b, world.a)):
            name = f"lab on {here.name} reaches lab on {there.name} over {family}, half-close kept"
            claims.check(name, partial(_lab, here, there, family))


def show_terminal(world: World) -> str:
    result, local = run_terminal(world, world.a.place("terminal"), EXCHANGES), world.a.v4
    done = result["authorisations"] + result["network_messages"]
    expect(done == EXCHANGES + 1, f"{done} of {EXCHANGES + 1} messages were answered")
    expect(result["local"].startswith(f"{local}:"), f"getsockname answered {result['local']}")
    return "{authorisations} 0100/0110 and {network_messages} 0800/0810, p50 {p50_ms:.3f} ms".format_map(result)


def _psql(world: World) -> str:
    ask = [program("psql"), "-h", world.b.v4, "-p", str(POSTGRES_PORT), "-U", "postgres", "-At", "-c", SQL]
    answer = _text(world.a.place("ledger"), [*ask, "-c", r"\conninfo"]).splitlines()
    wanted = f"{world.a.v4}|{world.b.v4}|{POSTGRES_PORT}|{SQL_MARK}"
    expect(answer[:1] == [wanted], f"expected {wanted}, got {answer[:1]}")
    expect(f'host "{world.b.v4}"' in answer[-1], f"conninfo says {answer[-1]}")
    return f"inet_client_addr() = {world.a.v4}, inet_server_addr() = {world.b.v4}"


def _names(world: World) -> str:
    to = f"{world.b.v4}:{POSTGRES_PORT}"
    seen = _json(world.a.place("ledger"), [PYTHON, "-m", "tests.apps.probe", "--connect", to, "--once"])
    expect(seen["result"] == "ok", f"{seen['step']} answered {seen['result']}")
    expect(seen["peer"] == to, f"getpeername answered {seen['peer']}, dialled was {to}")
    expect(seen["local"].startswith(f"{world.a.v4}:"), f"getsockname answered {seen['local']}")
    return f"getpeername {seen['peer']}, getsockname {seen['local']}"


def _pgbench(world: World) -> str:
    where = world.a.place("ledger")
    ask = [program("pgbench"), "-h", world.b.v4, "-p", str(POSTGRES_PORT), "-U", "postgres"]
    _text(where, [*ask, "-i", "-s", "1", "-q", "postgres"])
    said = _text(where, [*ask, "-n", "-c", str(CLIENTS), "-t", str(TRANSACTIONS), "postgres"])
    wanted = CLIENTS * TRANSACTIONS
    done = re.search(r"actually processed: (\d+)/(\d+)", said)
    expect(done is not None and done.groups() == (str(wanted), str(wanted)), f"pgbench said {said!r}")
    speed = re.search(r"tps = ([\d.]+)", said)
    return f"{wanted} transactions of {CLIENTS} clients, {float(speed.group(1)) if speed else 0:.0f} a second"


def _lab(here: Host, there: Host, family: str) -> str:
    address, local = (there.v4, here.v4) if family == "IPv4" else (f"[{there.v6}]", f"[{here.v6}]")
    to = f"{address}:{LAB_PORT}"
    with listening(there, "lab", "tests.apps.echo", "serve", "--listen", to) as server:
        try:
            client = [PYTHON, "-m", "tests.apps.echo", "client", "--connect", to, "--json"]
            result = _json(here.place("lab"), client)
            accepted = next_line(server)["peer"]
        finally:
            server.terminate()
    expect(result["peer"] == to, f"getpeername answered {result['peer']}, dialled was {to}")
    expect(accepted == result["local"], f"accept named {accepted}, the client is {result['local']}")
    expect(accepted.startswith(f"{local}:"), f"accept named {accepted}, not {local}")
    return "{messages} messages, p50 {p50_ms:.3f} ms; accept() named {local}".format_map(result)


def _json(where: Place, command: list[str]) -> dict[str, Any]:
    return dict(json.loads(_text(where, command)))


def _text(where: Place, command: list[str]) -> str:
    done = place.run(where, command)
    expect(done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
