"""A real PostgreSQL on one host of the world, in its run directory: it never meets a cluster of this machine."""

from __future__ import annotations

import os
import pwd
from functools import cache
from pathlib import Path

from tests.world import place
from tests.world.host import Host
from tests.world.wait import until

USER = "postgres"
READY_S = 30


@cache
def program(name: str) -> str:
    """The newest installed one. Debian keeps several versions side by side, out of the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    if not found:
        raise FileNotFoundError(f"{name} is not installed; install Debian's postgresql and postgresql-contrib")
    return str(found[-1])


class Postgres:
    def __init__(self, host: Host, port: int) -> None:
        self._host = host
        self._port = port
        self._home = host.directory / "postgres"
        self._data = self._home / "data"

    def start(self) -> None:
        """Make a new cluster and start its server; returns when it answers."""
        _make_home(self._home)
        where = self._host.place("postgres", USER, own_ipc=True)
        initdb = [program("initdb"), "-D", str(self._data), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-locale"]
        done = place.run(where, [*initdb, "--no-sync"])
        if done.returncode:
            raise OSError(f"initdb failed: {done.stderr.strip()}")
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.77.0.0/24 trust\n")
        with (self._home / "server.log").open("w") as log:
            place.spawn(where, [program("postgres"), "-D", str(self._data), *self._settings()], stderr=log)
        until(self._answers, READY_S, f"PostgreSQL (see {self._home}/server.log)")

    def _settings(self) -> list[str]:
        settings = {
            "listen_addresses": self._host.v4,
            "port": str(self._port),
            "unix_socket_directories": str(self._home),
            "fsync": "off",
            # Files below the data directory, not /dev/shm: they go with it when the server is killed.
            "dynamic_shared_memory_type": "mmap",
        }
        return [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]

    def _answers(self) -> bool:
        ask = [program("pg_isready"), "-q", "-h", str(self._home), "-p", str(self._port)]
        return place.run(self._host.place("postgres"), ask).returncode == 0


def _make_home(directory: Path) -> None:
    account = pwd.getpwnam(USER)
    directory.mkdir()
    os.chown(directory, account.pw_uid, account.pw_gid)
