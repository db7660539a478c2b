"""Latency that an arm adds to no proxy, in the same round and at the same rate (pure)."""

from __future__ import annotations

from dataclasses import replace

from tests.bench.record import Measured, Record
from tests.bench.works import FIXED, NONE

PERCENTILES = ("p50_us", "p99_us")


def with_added(record: Record) -> Record:
    """The same, and `added_...` beside each percentile of the fixed rate. Below zero is noise, and shown as it is."""
    bases = {name: record.values(NONE, FIXED.name, FIXED.connections, name) for name in PERCENTILES}

    def add(one: Measured) -> Measured:
        if one.work != FIXED.name or one.arm == NONE:
            return one
        added = {
            f"added_{name}": one.figures[name] - base[one.round]
            for name, base in bases.items()
            if one.round in base and name in one.figures
        }
        return replace(one, figures={**one.figures, **added})

    return Record([add(one) for one in record.measured], record.failures)
