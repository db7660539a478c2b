"""`underpass config check`: everything that would stop the agent, at once."""

from __future__ import annotations

import argparse
import pwd
import sys
import time
from collections.abc import Callable
from pathlib import Path

from agent import app
from agent.certs.store import load_host
from agent.config import Config
from agent.control import sources
from policy.identity import SpiffeId


def check(arguments: argparse.Namespace) -> int:
    config = app.read_config(arguments.config)
    problems = [problem for step in (_user, _keys, _policy) for problem in _tried(step, config)]
    for problem in problems:
        print(f"underpass: {problem}", file=sys.stderr)
    if not problems:
        print(f"{arguments.config}: good; host {config.host} of {config.trust_domain}")
    return 1 if problems else 0


def _tried(step: Callable[[Config], None], config: Config) -> list[str]:
    try:
        step(config)
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]
    except ValueError as error:
        return str(error).splitlines()
    return []


def _user(config: Config) -> None:
    try:
        pwd.getpwnam(config.user)
    except KeyError:
        raise ValueError(f"user {config.user!r} does not exist; create it: useradd --system {config.user}") from None


def _keys(config: Config) -> None:
    load_host(Path(config.ca), config.host, config.trust_domain, time.time())


def _policy(config: Config) -> None:
    names = dict.fromkeys(rule.application for rule in config.identities)
    identities = [SpiffeId(config.trust_domain, config.host, name) for name in names]
    sources.compiled(sources.read(config.policy, config.services), config.trust_domain, identities)
