"""`underpass ca init` and `underpass ca host`: each returns the lines to print, or raises CertError."""

from __future__ import annotations

from pathlib import Path

from agent.certs.authority import make_intermediate, make_root
from agent.certs.store import load_root, write_host, write_root


def ca_init(directory: Path, trust_domain: str, now: float) -> list[str]:
    write_root(directory, make_root(trust_domain, now))
    return [
        f"made the root of {trust_domain} in {directory}",
        "keep root.key offline: it is needed only to add or renew a host",
        f"next: underpass ca host NAME --root {directory} --out DIRECTORY",
    ]


def ca_host(root_directory: Path, host: str, out_directory: Path, now: float) -> list[str]:
    trust_domain, root, roots_pem = load_root(root_directory, now)
    intermediate = make_intermediate(root, trust_domain, host, now)
    write_host(out_directory, roots_pem, intermediate)
    return [
        f"made root.pem, host.pem and host.key of host {host} of {trust_domain} in {out_directory}",
        f"move all three to host {host} over a safe channel: host.key can speak for every application of it",
    ]
