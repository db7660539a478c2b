"""How many connections fit: each takes two descriptors of one process, and the limit may be fixed."""

from __future__ import annotations

import resource
from contextlib import suppress

WANTED = 65_536
# Of the descriptors, for each connection. A little less than a half: stunnel refuses above 125/256 of them by itself.
SHARE = 0.48


def raise_descriptors() -> None:
    """For this process and all it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (WANTED, max(WANTED, hard)))
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(WANTED, hard), hard))


def most_connections() -> int:
    return fitting(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def fitting(descriptors: int) -> int:
    return max(1, int(descriptors * SHARE))
