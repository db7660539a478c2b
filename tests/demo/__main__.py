"""`python -m tests.demo [--json] [--stay]`: the guardian of the demo. The story itself runs in a child.

Two processes, so that one of them is left to clean up whichever is killed. Both hold the lock (the child inherits it):
the next demo waits for the last of them. If both are killed, the next demo sweeps up before it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from typing import NoReturn

from tests.demo import lock, signals
from tests.demo.claims import BROKEN
from tests.demo.result import Result
from tests.demo.signals import Stopped
from tests.demo.stage import NAME
from tests.demo.story import tell, unfinished
from tests.demo.table import show
from tests.world.cleanup import cleanup

STAYING = """
Everything is left running. In another terminal, for instance:

  ./run on a ledger -- psql -h 10.77.0.2 -U postgres -c 'select inet_client_addr()'
  ./run on a intruder -- psql -h 10.77.0.2 -U postgres -c 'select 1'          # no rule allows it
  ./run on a terminal -- .venv/bin/python -m tests.apps.terminal --connect 10.77.0.2:8583
  ./run on b lab -- .venv/bin/python -m tests.apps.echo serve --listen 10.77.0.2:9000
  ./run on a lab -- .venv/bin/python -m tests.apps.echo client --connect 10.77.0.2:9000
  ./run agent status -c /run/underpass-demo/a/agent.yaml
  tail -f /run/underpass-demo/a/log/outcomes.jsonl

Your own programs: as `lab` on either host, TCP ports 9000-9010 of 10.77.0.1, 10.77.0.2, fd77::1 and fd77::2.
Stop with Ctrl-C; everything is removed then.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run demo", description="Two hosts on this machine, and proof.")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output instead of a table")
    parser.add_argument("--stay", action="store_true", help="leave everything running until Ctrl-C")
    given = parser.parse_args()
    if os.geteuid() != 0:
        return _fail("needs root (namespaces, cgroups and BPF); start it as root")
    held = lock.take()
    if held is None:
        return _fail("another demo is running on this machine; stop it first, or wait for its end")
    try:
        return _guard(held, given.json, given.stay)
    finally:
        lock.release(held)


def _guard(held: int, as_json: bool, stay: bool) -> int:
    # Blocked until both sides are ready for them: a signal in between would stop one and leave the other.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP)
    guardian = os.getpid()
    told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # survives the child: has it said how the story went?
    child = os.fork()
    if child == 0:
        _child(guardian, held, told, as_json, stay)
    signals.forward_to(child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP)
    _, status = os.waitpid(child, 0)
    signals.ignore()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _tell_once(told, unfinished(f"it was killed by {signal.Signals(-code).name}"), as_json)
        code = 128 - code
    return _clean(code)


def _child(guardian: int, held: int, told: int, as_json: bool, stay: bool) -> NoReturn:
    """Never returns into the code of the guardian, whatever happens."""
    code = 1
    try:
        os.setsid()  # Ctrl-C then reaches the guardian alone, and one order to stop is enough
        signals.raise_when_told()
        alive = signals.die_with(guardian)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP)
        code = _story(told, as_json, stay) if alive else 1
    except Stopped as stopped:
        code = 128 + stopped.number
    finally:
        signals.ignore()
        code = _clean(code)
        if os.getppid() != guardian:
            lock.release(held)
        os._exit(code)


def _story(told: int, as_json: bool, stay: bool) -> int:
    result = Result()

    def then(result: Result) -> None:
        _tell_once(told, result, as_json)
        if stay:
            print(STAYING, file=sys.stderr, flush=True)
            _wait()

    try:
        tell(result, then)
    except (Stopped, Exception) as problem:  # a script gets its answer even from a demo with a bug
        if not isinstance(problem, (Stopped, *BROKEN)):
            traceback.print_exc()
        result.claims.add("the story comes to its end", False, str(problem))
        result.finish()
        _tell_once(told, result, as_json)
        if isinstance(problem, Stopped):
            raise
    return 0 if result.ok else 1


def _wait() -> None:
    try:
        while True:
            signal.pause()
    except Stopped:
        return  # the ordinary end of --stay: how the story went is what counts


def _tell_once(told: int, result: Result, as_json: bool) -> None:
    """However the story ends, standard output has one answer: of the child, or of the guardian for a killed child."""
    try:
        os.eventfd_read(told)
    except BlockingIOError:
        print(json.dumps(result.as_json()) if as_json else show(result), flush=True)
    os.eventfd_write(told, 1)


def _clean(code: int) -> int:
    """Twice is harmless: the child cleans for a guardian that was killed, the guardian for a killed child."""
    try:
        cleanup(NAME)
    except BROKEN as problem:
        return code or _fail(f"could not remove everything: {problem}")
    return code


def _fail(text: str) -> int:
    print(f"demo: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
