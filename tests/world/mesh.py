"""What a world's agents are told: applications, services and policy, and each host's configuration made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TRUST_DOMAIN = "demo.bank"
TUNNEL_PORT, CAPTURE_PORT, ADMIN_PORT = 15008, 15001, 15090
AGENT_USER = "nobody"  # an account that every Debian has; a real host has one of its own


@dataclass(frozen=True, slots=True)
class Mesh:
    """`applications` by host; `services` and `rules` as in services.yaml and a policy file; `settings` go on top of
    every host's configuration (for instance `{"report_open_every": "1s"}`)."""

    applications: Mapping[str, Sequence[str]]
    services: Mapping[str, Any]
    rules: Sequence[Mapping[str, Any]]
    same_node: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def policy(self) -> dict[str, Any]:
        same_node = {"same_node": self.same_node} if self.same_node else {}
        return {"version": 1, **same_node, "rules": [dict(rule) for rule in self.rules]}

    def directory(self, tunnels: Mapping[str, str]) -> dict[str, Any]:
        hosts = {host: {"tunnel": tunnel} for host, tunnel in tunnels.items()}
        return {"hosts": hosts, "services": dict(self.services)}

    def config(self, host: str, directory: Path, cgroup_root: Path, cgroup_id: str) -> dict[str, Any]:
        """`cgroup_id` is `cgroup_root` as identity rules name it."""
        return {
            "host": host,
            "trust_domain": TRUST_DOMAIN,
            "cgroup_root": str(cgroup_root),
            "state_dir": str(directory / "state"),
            "run_dir": str(directory / "run"),
            "bpffs": str(directory / "bpf"),
            "user": AGENT_USER,
            "workers": 1,
            "capture": {"port": CAPTURE_PORT},
            "tunnel": {"listen": f"0.0.0.0:{TUNNEL_PORT}"},
            "admin": {"listen": f"127.0.0.1:{ADMIN_PORT}"},
            "ca": str(directory / "ca"),
            "policy": str(directory / "policy.d"),
            "services": str(directory / "services.yaml"),
            "outcomes": str(directory / "log" / "outcomes.jsonl"),
            "identities": [
                {"application": application, "match": {"cgroup": f"{cgroup_id}/{application}"}}
                for application in self.applications.get(host, ())
            ],
            **self.settings,
        }


def write(file: Path, content: Mapping[str, Any]) -> None:
    """In one step: an agent that reloads must never read half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    beside.replace(file)
