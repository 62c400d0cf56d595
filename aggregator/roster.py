"""Who is there, and who may use a name. Pure; ``now`` is a monotonic clock's reading in seconds.

A site is known by its *install* (its state directory) and heard as a *boot* (one process of it). The same install
may always come back: it was restarted, and its state directory's lock makes sure that it is one process. Another
install may take the name only when its holder has not been heard for ``SILENCE_S``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

SILENCE_S = 15.0
"""Sites speak every second or two; one unheard for so long is not alive, or cut off."""
GONE_S = 3.0
"""What is left of ``SILENCE_S`` after a site's goodbye or last will: time to come back after a blink."""

MAX_SITES = 10_000
"""Names that are known at once. Who may connect may make up names; memory must not follow."""


@dataclass
class _Holder:
    install: str
    boot: str | None
    heard_at: float


class Roster:
    """The sites of a run.

    Args:
        installs: sites known from before a restart; they count as just heard.
        now: see above.
    """

    def __init__(self, installs: Mapping[str, str], *, now: float) -> None:
        self._holders = {site: _Holder(install=install, boot=None, heard_at=now) for site, install in installs.items()}

    def admit(self, site: str, *, install: str, boot: str, now: float) -> bool:
        """Whether this process may be ``site``; if so it now is."""
        holder = self._holders.get(site)
        if holder is not None and holder.install != install and self.is_live(site, now):
            return False
        self._holders[site] = _Holder(install=install, boot=boot, heard_at=now)
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
        holder.heard_at = min(holder.heard_at, now - SILENCE_S + GONE_S)
        return True

    def __contains__(self, site: str) -> bool:
        return site in self._holders

    def install_of(self, site: str) -> str | None:
        """The install that holds a name."""
        holder = self._holders.get(site)
        return None if holder is None else holder.install

    def num_live(self, now: float) -> int:
        """How many sites were heard lately."""
        return sum(holder.boot is not None and now - holder.heard_at < SILENCE_S for holder in self._holders.values())

    def is_live(self, site: str, now: float) -> bool:
        """Whether a site was heard lately."""
        holder = self._holders.get(site)
        return holder is not None and now - holder.heard_at < SILENCE_S
