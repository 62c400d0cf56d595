"""How often a site may do what costs the others something. Pure; ``now`` is a monotonic clock's reading in seconds.

Messages cost time; a site that joins, leaves, pauses or goes on because it says so costs an entry of the journal. What
is beyond a site's allowance has no effect. Sites say everything again until it is answered, and how they stand every
second, so one that was cut short loses only time.
"""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.config import MAX_SITES
from edgeflame.log import EventLog

log = EventLog("aggregator")


@dataclass
class _TokenBucket:
    tokens: float
    counted_at: float
    is_reported: bool = False


class Allowances:
    """A token bucket for each site.

    Args:
        what: of which there may be too many, for the log.
        at_once: the most at a time.
        per_s: how many more a second.
    """

    def __init__(self, what: str, *, at_once: float, per_s: float) -> None:
        self._what = what
        self._at_once = at_once
        self._per_s = per_s
        self._buckets: dict[str, _TokenBucket] = {}

    def take(self, site: str, now: float) -> bool:
        """Whether the site may once more. That it may not is logged once, until its bucket has been full again."""
        bucket = self._buckets.get(site)
        if bucket is None:
            if len(self._buckets) >= MAX_SITES:
                # Names can be made up, and memory is bounded: the oldest begins anew.
                self._buckets.pop(next(iter(self._buckets)))
            bucket = self._buckets[site] = _TokenBucket(tokens=self._at_once, counted_at=now)
        bucket.tokens = min(self._at_once, bucket.tokens + (now - bucket.counted_at) * self._per_s)
        bucket.counted_at = now
        if bucket.tokens >= self._at_once:
            bucket.is_reported = False
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return True
        if not bucket.is_reported:
            bucket.is_reported = True
            log.warning("site_slowed_down", site=site, too_many=self._what)
        return False


def message_allowances() -> Allowances:
    """An honest site sends one or two messages a second, and a few more at every step of a run. Not counted are chunks
    and the requests for them, which a fast link carries by the hundred.
    """
    return Allowances("messages", at_once=200, per_s=50)


def warning_allowances() -> Allowances:
    """Lines of the log that a site can cause at will: a few tell what is wrong, and more would fill the disk."""
    return Allowances("warnings", at_once=20, per_s=0.1)


def change_allowances() -> Allowances:
    """A site joins and leaves once or twice in a run, and is paused and resumed by hand or by its shift plan."""
    return Allowances("changes", at_once=10, per_s=1 / 300)
