"""Who is a live member of the run, and who may use a site's name. Pure; ``now`` is a monotonic clock in seconds.

A site is identified by its *install* (its state directory) and known as a *boot* (one process of it). A site's name is
leased to an install. The same install may always come back: it was restarted, and the lock of its state directory
makes sure that it is one process. Another install may take the name only when its holder has not been heard for
``LIVENESS_TIMEOUT_S``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from aggregator.config import MAX_SITES
from aggregator.events import RunState
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import BlobNeed, Heartbeat, Hello, Presence, TurnedAway, Welcome

log = EventLog("aggregator")

LIVENESS_TIMEOUT_S = 15.0
"""Sites send a heartbeat every second or two; one unheard for this long is dead, or cut off."""
RECONNECT_GRACE_S = 3.0
"""How long a site counts as live after its goodbye or last will: time to come back after a short break."""


@dataclass
class _SiteLease:
    install: str
    boot: str | None
    """The process that was admitted; None if none was since the aggregator started."""
    heard_at: float
    last_step: tuple[object, ...] | None = None
    last_need: tuple[str, bytes] | None = None


class Membership:
    """The processes that are the run's sites.

    Args:
        state: the run; its members are known from before a restart, and count as just heard.
        aggregator_boot: id of this process.
        now: monotonic clock, seconds.
    """

    def __init__(self, state: RunState, *, aggregator_boot: str, now: float) -> None:
        self._expected = frozenset(state.config.expected_sites)
        self._boot = aggregator_boot
        self._leases = {
            site: _SiteLease(install=member.install, boot=None, heard_at=now) for site, member in state.members.items()
        }

    def admit(self, site: str, hello: Hello, state: RunState, now: float) -> Welcome | TurnedAway:
        """The answer to a process that wants to be ``site``; ``state`` is the run as it stands."""
        if self._expected and site not in self._expected:
            names = ", ".join(sorted(self._expected))
            return _turn_away(hello, "unknown_site", f"this run is for the sites {names}")
        departed = state.left.get(site)
        if departed is not None and departed.install == hello.install and state.ended is None:
            detail = f"this site has left the run: {departed.detail}; to join anew, give it another state directory"
            return _turn_away(hello, "left", detail)
        lease = self._leases.get(site)
        if lease is None:
            if not self._make_room(state.members.keys(), now):
                log.warning("site_refused", site=site, reason="full")
                return _turn_away(hello, "full", f"this fleet has {MAX_SITES} sites already")
            self._leases[site] = _SiteLease(install=hello.install, boot=hello.boot, heard_at=now)
        elif lease.install != hello.install and _is_live(lease, now):
            log.warning("second_site_of_that_name_refused", site=site, boot=hello.boot)
            detail = (
                f"another site named {site!r} is connected; choose another name, or stop the other one. "
                f"If it was just replaced, try again in {LIVENESS_TIMEOUT_S:.0f} s"
            )
            return _turn_away(hello, "name_in_use", detail)
        else:
            lease.install, lease.boot, lease.heard_at = hello.install, hello.boot, now
        return Welcome(boot=hello.boot, aggregator=self._boot)

    def heartbeat(self, site: str, beat: Heartbeat, now: float) -> bool:
        """Take a heartbeat; returns whether it is the admitted process's."""
        if not self.is_admitted(site, beat.boot):
            return False
        self._leases[site].heard_at = now
        return True

    def mark_offline(self, site: str, presence: Presence, now: float) -> bool:
        """Take an offline presence (a process left, or its link broke); returns whether it is the admitted one's."""
        if not self.is_admitted(site, presence.boot):
            return False
        lease = self._leases[site]
        lease.heard_at = min(lease.heard_at, now - LIVENESS_TIMEOUT_S + RECONNECT_GRACE_S)
        return True

    def is_progress(self, site: str, beat: Heartbeat) -> bool:
        """Whether a known site's heartbeat shows progress since the last."""
        lease, step = self._leases[site], (beat.boot, beat.activity, beat.round, beat.step)
        changed, lease.last_step = lease.last_step != step, step
        return changed

    def is_new_chunk_request(self, site: str, need: BlobNeed) -> bool:
        """Whether a known site's request for chunks differs from its last: something arrived there."""
        lease, entry = self._leases[site], (need.sha256, need.missing)
        changed, lease.last_need = lease.last_need != entry, entry
        return changed

    def is_admitted(self, site: str, boot: str) -> bool:
        """Whether a process is the one admitted as a site."""
        lease = self._leases.get(site)
        return lease is not None and lease.boot == boot

    def is_known(self, site: str) -> bool:
        """Whether the name is leased. Messages of other sites, which sent no Hello, are ignored."""
        return site in self._leases

    def install_of(self, site: str) -> str | None:
        """The install that holds a name."""
        lease = self._leases.get(site)
        return None if lease is None else lease.install

    def release(self, site: str) -> str | None:
        """Free the name of a site that is no longer part of the run; returns the boot it was admitted as."""
        lease = self._leases.pop(site, None)
        return None if lease is None else lease.boot

    def num_live(self, now: float) -> int:
        """How many admitted processes were heard lately."""
        return sum(lease.boot is not None and _is_live(lease, now) for lease in self._leases.values())

    def _make_room(self, keep: Collection[str], now: float) -> bool:
        """Whether there is room for another name. Whoever may connect may make up names, and memory use must stay
        bounded: if there are ``MAX_SITES``, silent ones that need not be kept are forgotten.
        """
        if len(self._leases) >= MAX_SITES:
            for site in [site for site, lease in self._leases.items() if site not in keep and not _is_live(lease, now)]:
                del self._leases[site]
        return len(self._leases) < MAX_SITES


def _is_live(lease: _SiteLease, now: float) -> bool:
    return now - lease.heard_at < LIVENESS_TIMEOUT_S


def _turn_away(hello: Hello, reason: str, detail: str) -> TurnedAway:
    return TurnedAway(boot=hello.boot, reason=reason, detail=detail[:500])
