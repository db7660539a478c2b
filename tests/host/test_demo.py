"""The demo itself: every claim holds, and nothing is left behind, also when it is interrupted half-way."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.world import names
from tests.world.cleanup import leftovers
from tests.world.place import PYTHON
from tests.world.wait import until

ROOT = Path(__file__).resolve().parents[2]
DEMO = [PYTHON, "-m", "tests.demo", "--json"]
KEYS = {"ok", "claims", "flows", "added_ms", "plaintext_bytes_on_wire", "seconds"}


def test_every_claim_holds_and_nothing_is_left() -> None:
    done = subprocess.run(DEMO, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    answer = json.loads(done.stdout)  # exactly one JSON object
    assert [claim for claim in answer["claims"] if not claim["ok"]] == [], done.stderr
    assert done.returncode == 0, done.stderr
    assert set(answer) >= KEYS
    assert len(answer["claims"]) >= 20
    assert answer["plaintext_bytes_on_wire"] == 0
    assert {flow["service"] for flow in answer["flows"]} >= {"core-db", "auth-switch", "lab"}
    assert leftovers("demo") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_half_way_it_leaves_nothing(number: signal.Signals) -> None:
    demo = subprocess.Popen(DEMO, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: list(names.run_dir("demo").glob("a/**/roles.json")) or demo.poll() is not None, 60, "an agent")
    demo.send_signal(number)
    assert demo.wait(60) != 0
    until(lambda: leftovers("demo") == [], 60, "a clean machine")
