"""Where a run took place: enough to judge its figures, nothing that names the machine."""

from __future__ import annotations

import os
import platform
import re
import ssl
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tests.bench.peers import envoy

_ASK: dict[str, list[str]] = {
    "haproxy": ["haproxy", "-v"],
    "nginx": ["nginx", "-v"],
    "stunnel": ["stunnel4", "-version"],
    "envoy": [str(envoy.program()), "--version"],
    "cc": ["cc", "--version"],
}
_VERSION = re.compile(r"\d+\.\d+(?:\.\d+)?")
ASK_S = 20


def machine() -> str:
    cpu = _first(Path("/proc/cpuinfo"), "model name") or platform.machine()
    memory = int((_first(Path("/proc/meminfo"), "MemTotal") or "0").split()[0]) / 1e6
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GB, load average {load:.2f} when it began"


def versions() -> dict[str, str]:
    asked = {name: _version(command) for name, command in _ASK.items()}
    ours = {"underpass": metadata.version("underpass"), "python": platform.python_version()}
    return {"kernel": platform.release().split("-")[0], **ours, "openssl": _in(ssl.OPENSSL_VERSION), **asked}


def _version(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "not installed"
    return _in(done.stdout + done.stderr)


def _in(text: str) -> str:
    found = _VERSION.search(text)
    return found.group() if found else "unknown"


def _first(file: Path, key: str) -> str | None:
    for line in file.read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None
