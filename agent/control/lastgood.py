"""The last policy and services that were good, kept on disk: a restart beside a broken file must not be an outage."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from agent.control.sources import Texts


def save(path: Path, texts: Texts) -> None:
    """Atomically; OSError when the disk does not take it."""
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(asdict(texts), file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def load(path: Path) -> Texts | None:
    """None when there is none, or it cannot be read as one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        policies = tuple((str(source), str(text)) for source, text in raw["policies"])
        return Texts(policies, (str(raw["services"][0]), str(raw["services"][1])))
    except (OSError, ValueError, KeyError, TypeError):
        return None
