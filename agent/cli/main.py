"""Arguments to calls; errors to one line on standard error and a status: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from agent import app
from agent.certs import commands as ca
from agent.cli import config as config_command
from agent.cli import hooks as hooks_command
from agent.cli import status as status_command
from agent.hooks.problem import Problem
from policy.fields import Invalid

DEFAULT_CONFIG = "/etc/underpass/underpass.yaml"

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=_format(arguments))
    command: Command = arguments.command
    try:
        return command(arguments)
    except Invalid as invalid:
        for problem in invalid.problems:
            print(f"underpass: {problem}", file=sys.stderr)
    except (app.StartError, Problem, ValueError) as error:
        print(f"underpass: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"underpass: {where}{error.strerror or error}", file=sys.stderr)
    return 1


def _format(arguments: argparse.Namespace) -> str:
    name = getattr(arguments, "name", "supervisor")
    return f"%(levelname)s {name}: %(message)s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="underpass", description="Mutual TLS for applications that cannot change.")
    nouns = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _add(nouns, "run", "run the agent in the foreground", lambda a: app.run(a.config))
    status = _add(nouns, "status", "show the running agent", status_command.show)
    status.add_argument("--json", action="store_true")
    for each in (run, status):
        _add_config(each)
    _add_config_commands(nouns)
    _add_hooks_commands(nouns)
    _add_ca_commands(nouns)
    role = _add(nouns, "role", argparse.SUPPRESS, lambda a: app.run_role(a.name, a.config, json.loads(a.fds)))
    role.add_argument("name")
    role.add_argument("--fds", required=True)
    _add_config(role)
    return parser


def _add(
    to: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, command: Command
) -> argparse.ArgumentParser:
    # An entry without help text is not listed, so that `role` stays out of people's way.
    hidden = help_text == argparse.SUPPRESS
    parser = to.add_parser(name) if hidden else to.add_parser(name, help=help_text)
    parser.set_defaults(command=command)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", default=DEFAULT_CONFIG, help=f"default: {DEFAULT_CONFIG}")


def _add_config_commands(nouns: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verbs = nouns.add_parser("config", help="the configuration").add_subparsers(required=True, metavar="VERB")
    _add_config(_add(verbs, "check", "every problem of configuration, policy, services and keys", config_command.check))


def _add_hooks_commands(nouns: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verbs = nouns.add_parser("hooks", help="the kernel programs").add_subparsers(required=True, metavar="VERB")
    status = _add(verbs, "status", "what should be attached and what is", hooks_command.status)
    status.add_argument("--json", action="store_true")
    remove = _add(verbs, "remove", "take away exactly what is ours; protection ends", hooks_command.remove)
    for each in (status, remove):
        _add_config(each)


def _add_ca_commands(nouns: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verbs = nouns.add_parser("ca", help="the mesh's certificates").add_subparsers(required=True, metavar="VERB")
    init = _add(
        verbs, "init", "make the root of a mesh", lambda a: _tell(ca.ca_init(a.directory, a.trust_domain, time.time()))
    )
    init.add_argument("directory", type=Path)
    init.add_argument("--trust-domain", required=True)
    host = _add(
        verbs,
        "host",
        "make the intermediate of one host",
        lambda a: _tell(ca.ca_host(a.root, a.name, a.out, time.time())),
    )
    host.add_argument("name")
    host.add_argument("--root", type=Path, required=True, help="the directory that `ca init` made")
    host.add_argument("--out", type=Path, required=True, help="where root.pem, host.pem and host.key go")


def _tell(lines: Sequence[str]) -> int:
    for line in lines:
        print(line)
    return 0
