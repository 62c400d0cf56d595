"""Who is a live member of the run, and who may use a site's name. Pure; ``now`` is a monotonic clock in seconds.

A site is identified by its *install* (its state directory) and heard as a *boot* (one process of it). A site's name is
leased to an install. The same install may always come back: it was restarted, and the lock of its state directory
makes sure that it is one process. Another install may take the name only when its holder has not been heard for
``LIVENESS_TIMEOUT_S``.

:class:`Membership` answers a process that says hello, with a welcome or a refusal, and tells whether a heartbeat is the
admitted process's and shows progress.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from aggregator.config import MAX_SITES
from aggregator.events import RunState
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import BlobNeed, Heartbeat, Hello, Presence, TurnedAway, Welcome

LIVENESS_TIMEOUT_S = 15.0
"""Sites speak every second or two; one unheard for so long is not alive, or cut off."""
RECONNECT_GRACE_S = 3.0
"""What is left of ``LIVENESS_TIMEOUT_S`` after a site's goodbye or last will: time to come back after a blink."""


@dataclass
class _SiteLease:
    install: str
    boot: str | None
    heard_at: float


class SiteLeases:
    """The sites of a run.

    Args:
        installs: sites known from before a restart; they count as just heard.
        now: see above.
    """

    def __init__(self, installs: Mapping[str, str], *, now: float) -> None:
        self._holders = {
            site: _SiteLease(install=install, boot=None, heard_at=now) for site, install in installs.items()
        }

    def admit(self, site: str, *, install: str, boot: str, now: float) -> bool:
        """Whether this process may be ``site``; if so it now is."""
        holder = self._holders.get(site)
        if holder is not None and holder.install != install and self.is_live(site, now):
            return False
        self._holders[site] = _SiteLease(install=install, boot=boot, heard_at=now)
        return True

    def release(self, site: str) -> None:
        """A site has left: its name is free."""
        self._holders.pop(site, None)

    def make_room(self, keep: Collection[str], now: float) -> bool:
        """Forget who is silent and not to be kept, if there are ``MAX_SITES``; whether another has room then."""
        if len(self._holders) >= MAX_SITES:
            for site in [site for site in self._holders if site not in keep and not self.is_live(site, now)]:
                del self._holders[site]
        return len(self._holders) < MAX_SITES

    def boot_of(self, site: str) -> str | None:
        """The process that was admitted as a site and heard since our start."""
        holder = self._holders.get(site)
        return None if holder is None else holder.boot

    def heard(self, site: str, *, boot: str, now: float) -> bool:
        """A sign of life of a boot; whether that is the one admitted."""
        holder = self._holders.get(site)
        if holder is None or holder.boot != boot:
            return False
        holder.heard_at = now
        return True

    def gone(self, site: str, *, boot: str, now: float) -> bool:
        """A boot left, or its link broke; whether that is the one admitted."""
        holder = self._holders.get(site)
        if holder is None or holder.boot != boot:
            return False
        holder.heard_at = min(holder.heard_at, now - LIVENESS_TIMEOUT_S + RECONNECT_GRACE_S)
        return True

    def __contains__(self, site: str) -> bool:
        return site in self._holders

    def install_of(self, site: str) -> str | None:
        """The install that holds a name."""
        holder = self._holders.get(site)
        return None if holder is None else holder.install

    def num_live(self, now: float) -> int:
        """How many sites were heard lately."""
        return sum(
            holder.boot is not None and now - holder.heard_at < LIVENESS_TIMEOUT_S for holder in self._holders.values()
        )

    def is_live(self, site: str, now: float) -> bool:
        """Whether a site was heard lately."""
        holder = self._holders.get(site)
        return holder is not None and now - holder.heard_at < LIVENESS_TIMEOUT_S


log = EventLog("aggregator")


class Membership:
    """The sites as processes: their boots, their signs of life.

    Args:
        state: the run; its members are known from before a restart.
        aggregator_boot: ours.
        now: monotonic clock, seconds.
    """

    def __init__(self, state: RunState, *, aggregator_boot: str, now: float) -> None:
        self._expected = frozenset(state.config.expected_sites)
        self._boot = aggregator_boot
        self._roster = SiteLeases({site: member.install for site, member in state.members.items()}, now=now)
        self._last_step: dict[str, tuple[object, ...]] = {}
        self._last_need: dict[str, tuple[str, bytes]] = {}

    def hello(self, site: str, hello: Hello, state: RunState, now: float) -> Welcome | TurnedAway:
        """The answer to a process that wants to be ``site``; ``state`` is the run as it stands."""
        if self._expected and site not in self._expected:
            names = ", ".join(sorted(self._expected))
            detail = f"this run is for the sites {names}"[:500]
            return TurnedAway(boot=hello.boot, reason="unknown_site", detail=detail)
        gone = state.left.get(site)
        if gone is not None and gone.install == hello.install and state.ended is None:
            detail = f"this site has left the run: {gone.detail}; to join anew, give it another state directory"[:500]
            return TurnedAway(boot=hello.boot, reason="left", detail=detail)
        if site not in self._roster and not self._roster.make_room(state.members.keys(), now):
            log.warning("site_refused", site=site, reason="full")
            return TurnedAway(boot=hello.boot, reason="full", detail=f"this fleet has {MAX_SITES} sites already")
        if not self._roster.admit(site, install=hello.install, boot=hello.boot, now=now):
            log.warning("second_site_of_that_name_refused", site=site, boot=hello.boot)
            detail = (
                f"another site named {site!r} is connected; choose another name, or stop the other one. "
                f"If it was just replaced, try again in {LIVENESS_TIMEOUT_S:.0f} s"
            )
            return TurnedAway(boot=hello.boot, reason="name_in_use", detail=detail)
        return Welcome(boot=hello.boot, aggregator=self._boot)

    def heartbeat(self, site: str, beat: Heartbeat, now: float) -> bool:
        """Whether a heartbeat is the admitted process's."""
        return self._roster.heard(site, boot=beat.boot, now=now)

    def is_step(self, site: str, beat: Heartbeat) -> bool:
        """Whether a heartbeat shows progress since the last."""
        step = (beat.boot, beat.activity, beat.round, beat.step)
        changed = self._last_step.get(site) != step
        self._last_step[site] = step
        return changed

    def is_new_need(self, site: str, need: BlobNeed) -> bool:
        """Whether a request for chunks is another than the last: something arrived there."""
        entry = (need.sha256, need.missing)
        changed = self._last_need.get(site) != entry
        self._last_need[site] = entry
        return changed

    def is_admitted(self, site: str, boot: str) -> bool:
        """Whether a process is the one admitted as a site."""
        return self._roster.boot_of(site) == boot

    def knows(self, site: str) -> bool:
        """Whether anyone was admitted as a site: others have said no hello, and are not listened to."""
        return site in self._roster

    def release(self, site: str) -> str | None:
        """A site is of the run no more; the boot it was admitted as."""
        boot = self._roster.boot_of(site)
        self._roster.release(site)
        self._last_step.pop(site, None)
        self._last_need.pop(site, None)
        return boot

    def left(self, site: str, presence: Presence, now: float) -> bool:
        """Whether an offline presence is the admitted process's."""
        return self._roster.gone(site, boot=presence.boot, now=now)

    def num_live(self, now: float) -> int:
        """How many sites were heard lately."""
        return self._roster.num_live(now)

    def install_of(self, site: str) -> str | None:
        """The install that holds a name."""
        return self._roster.install_of(site)
