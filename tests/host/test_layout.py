"""agent/records.py and agent/hooks/pins.py against what bcc derives from bpf/flow.h and bpf/maps.h."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent import bpfcall, records
from agent.hooks import pins, source
from tests.host.kernel_fixture import Kernel

# Needs LLVM, hence a child. A field is (name, offset, size).
_DERIVE = """
import ctypes, json, os, sys
os.environ["BCC_KERNEL_SOURCE"] = sys.argv[1]
from bcc import BPF
names = sys.argv[3].split()
text = "#include \\"flow.h\\"\\n" + "".join(f"BPF_HASH(of_{n}, u32, struct {n}, 1);" for n in names)
module = BPF(text=text, cflags=["-I" + sys.argv[2]])
leaves = {n: module["of_" + n].Leaf for n in names}
print(json.dumps({
    n: [ctypes.sizeof(leaf), [(f[0], getattr(leaf, f[0]).offset, getattr(leaf, f[0]).size) for f in leaf._fields_]]
    for n, leaf in leaves.items()
}))
"""

STRUCTS = {
    "flow": records.FLOW,
    "tuple": records.TUPLE,
    "service_key": records.SERVICE_KEY,
    "service": records.SERVICE,
    "caller_key": records.CALLER_KEY,
    "verdict_key": records.VERDICT_KEY,
    "verdict": records.VERDICT,
    "settings": records.SETTINGS,
    "refusal": records.REFUSAL,
    "lease": records.LEASE,
    "closing": records.CLOSING,
}


@pytest.fixture(scope="module")
def derived() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _DERIVE, str(source.include_tree()), str(source.bpf_directory()), " ".join(STRUCTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", STRUCTS)
def test_a_record_has_the_size_of_its_struct(derived: dict[str, Any], name: str) -> None:
    assert STRUCTS[name].size == derived[name][0]


@pytest.mark.parametrize("name", STRUCTS)
def test_the_fields_of_a_record_lie_where_c_has_them(derived: dict[str, Any], name: str) -> None:
    fields = [(offset, size) for field, offset, size in derived[name][1] if not field.startswith(("pad", "__pad"))]
    assert fields_of(STRUCTS[name].format, pads=name_pads(name)) == fields


def name_pads(name: str) -> int:
    """How many fields at the end are padding that the format writes as a number."""
    return {"tuple": 1, "caller_key": 1}.get(name, 0)


def fields_of(layout: str, pads: int) -> list[tuple[int, int]]:
    """(offset, size) of each item of a struct format without alignment."""
    found, offset, digits = [], 0, ""
    for code in layout.lstrip("="):
        if code.isdigit():
            digits += code
            continue
        count = int(digits or 1)
        items = [count] if code in "sx" else [struct.calcsize("=" + code)] * count
        for size in items:
            if code != "x":
                found.append((offset, size))
            offset += size
        digits = ""
    return found[: len(found) - pads]


def test_every_map_has_the_layout_that_adoption_compares_with(kernel: Kernel) -> None:
    for name, wanted in pins.layouts(kernel.config.capture.max_flows).items():
        assert pins.layout(bpfcall.map_info(kernel.map(name).fd)) == wanted, name


def test_the_pinned_directory_holds_exactly_what_is_named(kernel: Kernel) -> None:
    expected = {*pins.layouts(1), "programs", "links", *("maps.debug", "progs.debug")}
    assert {path.name for path in Path(kernel.config.bpffs).iterdir()} == expected
    assert os.stat(kernel.config.bpffs).st_mode & 0o777 == 0o700
