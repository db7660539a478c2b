"""One of a peer's two processes: on the client's side (plaintext in, TLS out) or on the server's (the reverse)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of one hop. `both` is chain and key in one file, as HAProxy wants it."""

    root: Path
    chain: Path
    key: Path
    both: Path


@dataclass(frozen=True, slots=True)
class Hop:
    """`dials_tls`: the client's side. `peer_name`: the DNS name that the other hop's certificate must have."""

    dials_tls: bool
    listen: tuple[str, int]
    target: tuple[str, int]
    tls: Tls
    peer_name: str
    directory: Path
    threads: int
    connections: int  # so many at most

    @property
    def listen_text(self) -> str:
        return f"{self.listen[0]}:{self.listen[1]}"

    @property
    def target_text(self) -> str:
        return f"{self.target[0]}:{self.target[1]}"


@dataclass(frozen=True, slots=True)
class Start:
    """How a hop is started: the configuration's file name and text, and the command."""

    file: str
    text: str
    command: list[str]
