"""Section ``[golden]`` of the inspection's configuration."""

from __future__ import annotations

import datetime as dt

import msgspec

from edgeflame.errors import ConfigError


class GoldenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is tested, and when."""

    folder: str | None = None
    """Photographs of known parts, ``good/`` that must pass and ``bad/`` that must fail; for several products in
    folders of their names. Left out: only a golden part before the camera can be tested."""
    times: tuple[str, ...] = ()
    """When the photographs are tested by themselves, local time: ``["06:00", "14:00", "22:00"]`` for each shift."""
    blocks_readiness: bool = True
    """A failed test makes the line not ready until one passes or a person acknowledges it."""
    wait_s: float = 60.0
    """How long a test before the camera waits for the golden part."""

    def __post_init__(self) -> None:
        for text in self.times:
            try:
                dt.time.fromisoformat(text)
            except ValueError as exc:
                msg = f"golden.times: {text[:40]!r} is no time of the day (such as 06:00)"
                raise ConfigError(msg) from exc
        if self.times and self.folder is None:
            msg = "golden.times needs golden.folder: a part before the camera cannot be tested by the clock"
            raise ConfigError(msg)
        if not 0 < self.wait_s <= 3600:
            msg = f"golden.wait_s must be in (0, 3600], not {self.wait_s}"
            raise ConfigError(msg)

    @property
    def day_times(self) -> tuple[dt.time, ...]:
        """In their order."""
        return tuple(sorted(dt.time.fromisoformat(text) for text in self.times))
