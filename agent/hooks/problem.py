"""The one exception of this package that is meant for an operator."""

from __future__ import annotations


class Problem(Exception):
    """Why the hooks cannot do what they should, in one sentence that names what to try next."""
