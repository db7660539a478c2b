"""The layout's import rules (ARCHITECTURE.md section 3), read from the sources themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.relative_to(ROOT) for top in ("agent", "policy") for path in (ROOT / top).rglob("*.py"))

ONLY_IMPORTER = {
    "bcc": "agent/hooks/",
    "pyroute2": "agent/host.py",
    "psutil": "agent/host.py",
    "aiohttp": "agent/admin/",
    "prometheus_client": "agent/metrics.py",
    "cryptography": "agent/certs/",
    "yaml": "policy/fields",
}
PURE = [
    "policy/",
    "agent/config.py",
    "agent/identity.py",
    "agent/outcome.py",
    "agent/records.py",
    "agent/route.py",
    "agent/snapshot.py",
    "agent/tunnel/",
    "agent/control/refusals.py",
    "agent/proxy/latency.py",
]
IMPURE_MODULES = {
    "os",
    "socket",
    "time",
    "logging",
    "subprocess",
    "select",
    "asyncio",
    "threading",
    "random",
    "pathlib",
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] == "policy"], ids=str)
def test_policy_never_imports_the_agent(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] in ("agent", "bpf")]


@pytest.mark.parametrize("library", ONLY_IMPORTER)
def test_a_library_has_one_importer(library: str) -> None:
    users = {str(path) for path in SOURCES if any(name.split(".")[0] == library for name in imports(path))}
    assert users, f"{library} is not used any more: take it out of pyproject.toml"
    assert all(user.startswith(ONLY_IMPORTER[library]) for user in users), users


@pytest.mark.parametrize("path", [p for p in SOURCES if str(p).startswith(tuple(PURE))], ids=str)
def test_a_pure_module_does_no_io(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & IMPURE_MODULES


def test_only_the_composition_root_sees_both_hooks_and_proxy() -> None:
    for path in SOURCES:
        names = list(imports(path))
        sees_hooks = any(name.startswith("agent.hooks") for name in names)
        sees_proxy = any(name.startswith("agent.proxy") for name in names)
        assert not (sees_hooks and sees_proxy) or str(path) == "agent/app.py", path
