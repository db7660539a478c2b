"""Compiling and loading, in a child that exits: LLVM leaves about 120 MB behind in any process that used it.

The parent starts a Compilation and asks it until it has ended; the child (`python -m agent.hooks.compile`) leaves the
programs pinned in a staging directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agent import bpfcall
from agent.hooks import source
from agent.hooks.problem import Problem

TIMEOUT = 60.0
_PR_SET_PDEATHSIG = 1
_LOG_LINES = 12  # the verifier names the instruction it refused at the end


class Compilation:
    """One running child. Maps under `pins` are adopted as they are, so pins.check() has to come first."""

    def __init__(self, pins: Path, staging: Path, max_flows: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in poll(); a pipe could fill up and block the child
        self._child = subprocess.Popen(
            [sys.executable, "-m", "agent.hooks.compile", str(pins), str(staging), str(max_flows), str(os.getpid())],
            cwd=source.bpf_directory().parent,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def poll(self) -> bool:
        """Whether it has ended well; Problem when it failed."""
        status = self._child.poll()
        if status is None:
            return False
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "backslashreplace")
        self._log.close()
        if status:
            raise Problem(explain(status, text))
        return True

    def wait(self) -> None:
        try:
            self._child.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.stop()
            raise Problem(
                f"compiling bpf/ took over {TIMEOUT:.0f} s; see whether the host is short of memory"
            ) from None
        self.poll()

    def stop(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()


def compile_programs(pins: Path, staging: Path, max_flows: int) -> None:
    Compilation(pins, staging, max_flows).wait()


def explain(status: int, log: str) -> str:
    """The child's output as one error: the first compiler error, or the end of the verifier's log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    if errors:
        return f"bpf/ does not compile: {errors[0]}"
    if status < 0:
        return f"the compiler of bpf/ was killed by signal {-status}; see whether the host is short of memory"
    return "the kernel did not take bpf/: " + " | ".join(lines[-_LOG_LINES:] or ["no message"])


def main(arguments: list[str]) -> int:
    pins, staging, max_flows, parent = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), int(arguments[3])
    _die_with(parent)
    # Kernels before 5.11 count maps against this limit; newer ones ignore it, so it does not matter if this is refused.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        _load(pins, staging, max_flows)
    except Exception as error:  # noqa: BLE001 - bcc raises bare Exception; the parent reads the text
        print(error, file=sys.stderr)
        return 1
    return 0


def _die_with(parent: int) -> None:
    """A parent killed meanwhile is started again and compiles itself: two must not write one staging directory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def _load(pins: Path, staging: Path, max_flows: int) -> None:
    module = _compile(pins, max_flows)
    staging.mkdir(mode=0o700, exist_ok=True)
    for name, hook in source.PROGRAMS.items():
        # Without attach_type the kernel answers EINVAL for these hooks.
        function = module.load_func(name.encode(), hook.program_type, attach_type=hook.attach_type)
        bpfcall.pin(function.fd, str(staging / name))


def _compile(pins: Path, max_flows: int) -> Any:
    os.environ["BCC_KERNEL_SOURCE"] = str(source.include_tree())
    from bcc import BPF  # here and nowhere else: importing it costs LLVM

    return BPF(text=source.unit().encode(), cflags=source.flags(pins, max_flows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
