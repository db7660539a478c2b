"""Policy and services from files. A change is taken whole when it parses, else the last good one stays in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.route import Routes
from policy.check import problems
from policy.compile import Table, compile_table
from policy.fields import Invalid
from policy.identity import SpiffeId
from policy.load import load_directory, load_policies

MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Texts:
    """`policies` and `services` as (source name, YAML text)."""

    policies: tuple[tuple[str, str], ...]
    services: tuple[str, str]


def read(policy: str, services: str) -> Texts:
    """OSError or ValueError, with a line that says which file and what."""
    policies = tuple((str(path), _text(path)) for path in _policy_files(Path(policy)))
    return Texts(policies, (services, _text(Path(services))))


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the texts mean: the kernel's table, and where addresses lead."""

    table: Table
    routes: Routes


def compiled(texts: Texts, trust_domain: str, identities: Sequence[SpiffeId]) -> Compiled:
    """Invalid when they mean nothing."""
    directory = load_directory(texts.services[1], texts.services[0])
    policy = load_policies(texts.policies)
    wrong = problems(policy, directory)
    if wrong:
        raise Invalid(wrong)
    table = compile_table(policy, trust_domain, directory, identities)
    return Compiled(table, Routes(directory, trust_domain))


def _policy_files(path: Path) -> list[Path]:
    """One file, or every *.yaml of a directory by name; editors' and package managers' leftovers do not count."""
    if not path.is_dir():
        return [path]
    return sorted(child for child in path.iterdir() if child.suffix == ".yaml" and not child.name.startswith("."))


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def problem_line(error: OSError | ValueError) -> str:
    """One line for a log, whatever went wrong."""
    if isinstance(error, Invalid):
        return "; ".join(str(problem) for problem in error.problems)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)
