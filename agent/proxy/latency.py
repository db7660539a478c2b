"""What this host's proxy added to each exchange of a stream: a small histogram with explicit bounds. Pure."""

from __future__ import annotations

from bisect import bisect_left

from agent.outcome import Percentiles

# Microseconds. 2,000 is the bound the service level is stated at, so it is one exactly.
BOUNDS_US = (10, 15, 20, 25, 30, 40, 50, 65, 80, 100, 130, 160, 200, 250, 300, 400, 500, 750, 1000, 1500, 2000, 3000,
             5000, 10000, 25000, 50000, 100000)  # fmt: skip


class AddedLatency:
    """An exchange is bytes one way and then bytes back. Each way costs from the wake-up that found the bytes ready to
    the end of the write that passed them on; an exchange adds the first cost of each way."""

    __slots__ = ("_request_ns", "counts")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_US) + 1)
        self._request_ns = -1  # cost of the request whose answer has not come yet

    def request(self, cost_ns: int) -> None:
        if self._request_ns < 0:
            self._request_ns = cost_ns

    def response(self, cost_ns: int) -> None:
        if self._request_ns >= 0:
            self.counts[bisect_left(BOUNDS_US, (self._request_ns + cost_ns) / 1000)] += 1
            self._request_ns = -1

    def percentiles(self) -> Percentiles | None:
        """Upper bound of the bucket each falls into; the last bucket answers with twice the last bound."""
        total = sum(self.counts)
        if not total:
            return None
        return Percentiles(self._quantile(total * 0.50), self._quantile(total * 0.99))

    def _quantile(self, rank: float) -> float:
        seen = 0
        for bound, number in zip((*BOUNDS_US, 2 * BOUNDS_US[-1]), self.counts, strict=True):
            seen += number
            if seen >= rank:
                return bound / 1000
        raise AssertionError("a rank beyond the total")
