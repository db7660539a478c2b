"""`underpass hooks status` and `underpass hooks remove`."""

from __future__ import annotations

import argparse
import json

from agent import app
from agent.hooks import commands


def status(arguments: argparse.Namespace) -> int:
    shown = commands.hooks_status(app.read_config(arguments.config))
    print(json.dumps(shown, indent=None if arguments.json else 2))
    return 0


def remove(arguments: argparse.Namespace) -> int:
    for line in commands.hooks_remove(app.read_config(arguments.config)):
        print(line)
    return 0
