"""What the supervisor tells the world about its roles: one small JSON file in the run directory, replaced whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "roles.json"


@dataclass(frozen=True, slots=True)
class RoleState:
    pid: int
    ready: bool
    restarts: int
    problem: str = ""
    lost_outcomes: int = 0  # that control did not take in time, over all processes of the role
    defects: int = 0


def write(run_dir: str, supervisor: int, roles: dict[str, RoleState]) -> None:
    text = json.dumps({"supervisor": supervisor, "roles": {name: asdict(state) for name, state in roles.items()}})
    path = Path(run_dir) / FILE
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def read(run_dir: str) -> dict[str, Any]:
    """{"ready", "supervisor", "roles"}; ready only if each process lives and says so. Nothing running is not ready."""
    try:
        state: dict[str, Any] = json.loads((Path(run_dir) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"ready": False, "supervisor": None, "roles": {}}
    roles = state["roles"]
    for role in roles.values():
        role["ready"] = bool(role["ready"]) and _lives(role["pid"])
    proxies = [role["ready"] for name, role in roles.items() if name.startswith("proxy")]
    others = [role["ready"] for name, role in roles.items() if not name.startswith("proxy")]
    lives = _lives(state["supervisor"])
    return {"ready": lives and bool(roles) and all(others) and any(proxies), **state}


def _lives(pid: int) -> bool:
    """A pid alone says little (it may be another process by now), but every supervisor rewrites the file."""
    return pid > 0 and os.path.exists(f"/proc/{pid}")
