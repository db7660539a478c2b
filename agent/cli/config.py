"""`underpass config check`: everything that would stop the agent, at once, and what looks like a mistake."""

from __future__ import annotations

import argparse
import os
import pwd
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from agent import app
from agent.certs.store import load_host
from agent.config import Config
from agent.control import sources
from policy.check import problems, warnings
from policy.identity import SpiffeId
from policy.load import load_directory, load_policies
from policy.model import Directory, Policy

T = TypeVar("T")


def check(arguments: argparse.Namespace) -> int:
    config = app.read_config(arguments.config)
    found: list[str] = []
    _tried(lambda: _user(config), found)
    _tried(lambda: load_host(Path(config.ca), config.host, config.trust_domain, time.time()), found)
    texts = _tried(lambda: sources.read(config.policy, config.services), found)
    policy = _tried(lambda: load_policies(texts.policies), found) if texts else None
    directory = _tried(lambda: load_directory(texts.services[1], texts.services[0]), found) if texts else None
    if policy and directory:
        found += [str(problem) for problem in problems(policy, directory)]
    doubts = list(_doubts(config, policy, directory))
    for line in found:
        print(f"underpass: {line}", file=sys.stderr)
    for line in doubts:
        print(f"underpass: warning: {line}", file=sys.stderr)
    if found or not (policy and directory and texts):
        return 1
    size = f"{len(config.identities)} identity rules, {len(directory.services)} services, {len(policy.rules)} rules"
    print(f"{arguments.config}: good; host {config.host} of {config.trust_domain}; {size}")
    return 0


def _tried(step: Callable[[], T], found: list[str]) -> T | None:
    try:
        return step()
    except OSError as error:
        found.append(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        found.extend(str(error).splitlines())
    return None


def _user(config: Config) -> None:
    try:
        pwd.getpwnam(config.user)
    except KeyError:
        raise ValueError(f"user {config.user!r} does not exist; create it: useradd --system {config.user}") from None


def _doubts(config: Config, policy: Policy | None, directory: Directory | None) -> Iterator[str]:
    if config.cgroup_root and not os.path.isdir(config.cgroup_root):
        yield f"cgroup_root: {config.cgroup_root} does not exist (yet)"
    for rule in config.identities:
        if rule.match.exe and not os.path.exists(rule.match.exe):
            yield f"identity {rule.application}: there is no {rule.match.exe}, so nobody matches"
        if isinstance(rule.match.uid, str) and not _is_user(rule.match.uid):
            yield f"identity {rule.application}: there is no user {rule.match.uid!r}, so nobody matches"
    if directory and config.host not in directory.hosts:
        yield f"services: host {config.host} is not in it; nobody can reach services here"
    if policy and directory:
        names = dict.fromkeys(rule.application for rule in config.identities)
        own = [SpiffeId(config.trust_domain, config.host, name) for name in names]
        yield from warnings(policy, directory, own)


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
