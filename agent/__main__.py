"""`underpass`, the command line. `underpass role` is what the supervisor starts its roles with."""

from __future__ import annotations

import sys

from agent.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
