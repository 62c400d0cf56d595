"""At the door: who says hello may come in or not, and whose heartbeat shows a step. Beside the rounds, and pure."""

from __future__ import annotations

from aggregator.facts import RunState
from aggregator.roster import MAX_SITES, SILENCE_S, Roster
from edgeflame.console import EventLog
from edgeflame.messages import BlobNeed, Heartbeat, Hello, Presence, Turned, Welcome

log = EventLog("aggregator")


class Hall:
    """The sites as processes: their boots, their signs of life.

    Args:
        state: the run; its members are known from before a restart.
        aggregator_boot: ours.
        now: monotonic clock, seconds.
    """

    def __init__(self, state: RunState, *, aggregator_boot: str, now: float) -> None:
        self._expected = frozenset(state.config.expected_sites)
        self._boot = aggregator_boot
        self._roster = Roster({site: member.install for site, member in state.members.items()}, now=now)
        self._last_step: dict[str, tuple[object, ...]] = {}
        self._last_need: dict[str, tuple[str, bytes]] = {}

    def hello(self, site: str, hello: Hello, state: RunState, now: float) -> Welcome | Turned:
        """The answer to a process that wants to be ``site``; ``state`` is the run as it stands."""
        if self._expected and site not in self._expected:
            names = ", ".join(sorted(self._expected))
            detail = f"this run is for the sites {names}"[:500]
            return Turned(boot=hello.boot, reason="unknown_site", detail=detail)
        gone = state.left.get(site)
        if gone is not None and gone.install == hello.install and state.ended is None:
            detail = f"this site has left the run: {gone.detail}; to join anew, give it another state directory"[:500]
            return Turned(boot=hello.boot, reason="left", detail=detail)
        if site not in self._roster and not self._roster.make_room(state.members.keys(), now):
            log.warning("site_refused", site=site, reason="full")
            return Turned(boot=hello.boot, reason="full", detail=f"this fleet has {MAX_SITES} sites already")
        if not self._roster.admit(site, install=hello.install, boot=hello.boot, now=now):
            log.warning("second_site_of_that_name_refused", site=site, boot=hello.boot)
            detail = (
                f"another site named {site!r} is connected; choose another name, or stop the other one. "
                f"If it was just replaced, try again in {SILENCE_S:.0f} s"
            )
            return Turned(boot=hello.boot, reason="name_in_use", detail=detail)
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
