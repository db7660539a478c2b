"""`underpass status`: what the supervisor wrote down, and what control answers on its socket."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
from datetime import UTC, datetime
from typing import Any

from agent import app, runstate
from agent.config import Config

TIMEOUT_S = 2.0


def show(arguments: argparse.Namespace) -> int:
    config = app.read_config(arguments.config)
    status = _from_control(config) or runstate.read(config.run_dir)
    if arguments.json:
        print(json.dumps(status))
    else:
        _print(status)
    return 0 if status["ready"] else 1


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def _from_control(config: Config) -> dict[str, Any] | None:
    """None when control does not answer: the supervisor's file then has to do."""
    connection = _UnixConnection(f"{config.run_dir}/control/admin.sock")
    try:
        connection.request("GET", "/status")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return answer


def _print(status: dict[str, Any]) -> None:
    print("ready" if status["ready"] else "not ready")
    for name, role in status["roles"].items():
        state = "ready" if role["ready"] else "not ready"
        problem = f": {role['problem']}" if role["problem"] else ""
        lost = f", {role['lost_outcomes']} outcomes lost" if role.get("lost_outcomes") else ""
        print(f"  {name:10} pid {role['pid'] or '-':>8}  {state}, {role['restarts']} restarts{lost}{problem}")
    if status.get("problem"):
        print(f"  policy or services: {status['problem']}")
    for identity, expiry in status.get("leaves", {}).items():
        until = datetime.fromtimestamp(expiry, UTC).isoformat(timespec="seconds") if expiry else "none"
        print(f"  {identity}  certificate until {until}")
