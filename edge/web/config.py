"""Section ``[web]`` of the inspection's configuration."""

from __future__ import annotations

import re

import msgspec

from edgeflame.errors import ConfigError

_LISTEN = re.compile(r"(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):(?P<port>[0-9]{1,5})", re.ASCII)


class WebConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the page is served, and how much it remembers."""

    listen: str = "127.0.0.1:8080"
    """``host:port``; ``0.0.0.0:8080`` for every interface: whoever reaches it sees the pictures."""
    stale_after_s: float = 30.0
    """Without a part for so long the line is not ready (``/readiness``), and the page says so."""
    recent: int = 8
    """Last parts whose picture is kept in memory, whatever their verdict."""
    rejects: int = 12
    """Last failed and unknown parts whose picture is kept in memory."""
    history: int = 300
    """Scores shown in the chart."""
    max_marks: int = 10_000
    """Parts that operators said something about and whose pictures are kept for the next training. They are never
    deleted: beyond these a mark is refused."""

    def __post_init__(self) -> None:
        match = _LISTEN.fullmatch(self.listen)
        if match is None or not 0 <= int(match["port"]) <= 65535:
            msg = f"web.listen must be host:port, not {self.listen[:100]!r}"
            raise ConfigError(msg)
        rules = (
            (self.stale_after_s > 0, "web.stale_after_s must be > 0", self.stale_after_s),
            (1 <= self.recent <= 100, "web.recent must be 1..100", self.recent),
            (1 <= self.rejects <= 100, "web.rejects must be 1..100", self.rejects),
            (self.max_marks >= 1, "web.max_marks must be at least 1", self.max_marks),
            (10 <= self.history <= 10_000, "web.history must be 10..10000", self.history),
        )
        for holds, rule, value in rules:
            if not holds:
                msg = f"{rule}, not {value}"
                raise ConfigError(msg)

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.listen.rpartition(":")[2])
