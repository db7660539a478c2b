from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.host.kernel_fixture import Kernel

NewKernel = Callable[..., Kernel]


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.fail("tests/host needs root: namespaces, cgroups and BPF")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """With the hooks installed; shared by a module, so each test takes a port of its own."""
    made = Kernel(tmp_path_factory.mktemp("kernel"))
    try:
        made.install()
        yield made
    finally:
        made.close()


@pytest.fixture
def new_kernel(tmp_path: Path) -> Iterator[NewKernel]:
    """Makes kernels for one test alone; nothing is installed in them."""
    made: list[Kernel] = []

    def make(**arguments: object) -> Kernel:
        directory = tmp_path / f"kernel{len(made)}"
        directory.mkdir()
        made.append(Kernel(directory, **arguments))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for kernel in made:
            kernel.close()
