"""One camera with one model: what is learnt, how strong the evidence is, and what is said of it. No clock, no I/O.

The streams of :mod:`edgeflame.condition` are watched one by one and spoken of in two groups, since what is to be done
differs: the camera's (the picture itself changed: lamp, lens, exposure, mounting) and the parts' (the model sees other
parts while the picture is as before). Where both did, either may be the cause: quite other parts make another picture.

An alarm stays until a person clears it, has the line learnt anew, or another model runs; whether the stream is still
off is said beside it. A warning comes at a twentieth of an alarm's evidence, so at most twenty times as often for
nothing, and goes by itself.
"""

from __future__ import annotations

import datetime as dt
import enum
import math
from collections.abc import Mapping

import msgspec
import numpy as np

from edge.drift.config import DriftConfig
from edge.drift.detector import F64, HIGHER, LOWER, Detector
from edge.drift.ranks import Ranks
from edgeflame.condition import (
    CAMERA_STREAMS,
    PART_STREAMS,
    STREAMS,
    ConditionReference,
    StreamReference,
    stream_reference,
)

WARNING_SHARE = 1 / 20
"""Of an alarm's evidence."""

MIN_WITNESSES = 30
"""Independent parts that a package's reference has to rest on; of fewer the doubt is greater than what is looked for,
and the line learns its own."""

_CEILING = 10
"""Evidence kept beyond an alarm's, as a multiple of it."""
_RECENT = 100
"""Parts over which the middle that people are shown is taken."""


class Condition(str, enum.Enum):
    """Of a stream, or of the worst of several."""

    LEARNING = "learning"
    OK = "ok"
    WARNING = "warning"
    ALARM = "alarm"


_BADNESS = {Condition.OK: 0, Condition.LEARNING: 1, Condition.WARNING: 2, Condition.ALARM: 3}


class StreamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One stream."""

    name: str
    condition: Condition
    direction: str | None
    """``higher`` or ``lower``, where there is a warning or an alarm."""
    rank: float | None
    """Where the typical one of the last parts lies among the reference's, 0..1; 0.5 is the middle."""
    evidence: float
    """0..1 on a logarithmic scale; 1 is an alarm."""
    since: dt.datetime | None
    """When the warning or alarm began."""
    is_off: bool
    """Whether the last parts are beyond the tolerance."""
    learnt: int | None
    """Parts learnt from so far, while learning."""


class DriftStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All of one camera with one model."""

    condition: Condition
    parts: Condition
    camera: Condition
    message: str
    """For people, without a full stop."""
    streams: tuple[StreamStatus, ...]
    """Those that are known or being learnt."""


class SavedStream(msgspec.Struct, kw_only=True):
    """What outlives a restart, of one stream."""

    learnt: StreamReference | None = None
    """The line's own reference, in place of the package's."""
    values: list[float] = []
    """Those it is being learnt from."""
    is_learning: bool = False
    wealth: list[list[float]] | None = None
    alarm_direction: int | None = None
    warning_direction: int | None = None
    since: dt.datetime | None = None
    rank: float | None = None


class Saved(msgspec.Struct, kw_only=True):
    """What outlives a restart."""

    format: int = 1
    streams: dict[str, SavedStream] = {}


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A stream's condition is another one than before."""

    stream: str
    before: Condition
    after: Condition
    direction: str | None


class DriftMonitor:
    """Watches.

    Args:
        config: how.
        reference: the package's, if it has one.
        saved: what an earlier run left, of the same camera and model.
    """

    def __init__(
        self, config: DriftConfig, reference: ConditionReference | None = None, saved: Saved | None = None
    ) -> None:
        self._config = config
        given = reference.streams if reference is not None and config.reference == "auto" else {}
        known = {name: one for name, one in given.items() if one.count >= MIN_WITNESSES}
        left = saved.streams if saved is not None else {}
        self._streams = {name: left.get(name) or SavedStream() for name in STREAMS}
        self._ranks: dict[str, Ranks] = {}
        self._alarm_at = config.parts_per_alarm * 2 * len(STREAMS)
        for name, stream in self._streams.items():
            using = stream.learnt or (None if stream.is_learning else known.get(name))
            if using is not None:
                self._ranks[name] = Ranks(name, using)
            else:
                stream.is_learning = True
        self._detector = self._new_detector()
        for index, stream in enumerate(self._streams.values()):
            wealth = np.asarray(stream.wealth or (), dtype=np.float64)
            if wealth.shape == self._detector.wealth.shape[1:] and np.isfinite(wealth).all():
                self._detector.wealth[index] = wealth

    def observe(self, values: Mapping[str, float], now: dt.datetime) -> list[Change]:
        """Take one part; says what changed.

        Args:
            values: by stream; those there are, finite.
            now: UTC.
        """
        before = {name: self._condition(name) for name in STREAMS}
        ranks = np.full(len(STREAMS), np.nan)
        for index, name in enumerate(STREAMS):
            value = values.get(name)
            if value is None or not math.isfinite(value):
                continue
            stream = self._streams[name]
            if stream.is_learning:
                self._learn(name, value)
            else:
                rank = self._ranks[name].rank(float(value))
                ranks[index] = rank
                stream.rank = rank if stream.rank is None else stream.rank + (rank - stream.rank) / _RECENT
        self._detector.update(ranks)
        evidence = self._detector.evidence()
        for index, (name, stream) in enumerate(self._streams.items()):
            self._judge(stream, self._counting(name, evidence[index]), now)
        changes = []
        for name, old in before.items():
            new = self._condition(name)
            if new is not old:
                changes.append(Change(stream=name, before=old, after=new, direction=self._direction(name)))
        return changes

    def clear(self) -> None:
        """Alarms are dealt with: start again with the same reference."""
        for stream in self._streams.values():
            stream.alarm_direction = stream.warning_direction = stream.since = stream.rank = None
        self._detector.wealth[:] = 0

    def relearn(self) -> None:
        """The line as it is from now on is right: learn every stream from the next parts."""
        self._streams = {name: SavedStream(is_learning=True) for name in STREAMS}
        self._ranks.clear()
        self._detector = self._new_detector()

    def saved(self) -> Saved:
        """What the next run needs to go on from here."""
        for index, stream in enumerate(self._streams.values()):
            stream.wealth = self._detector.wealth[index].tolist()
        return Saved(streams=self._streams)

    def status(self) -> DriftStatus:
        """What there is to be said."""
        evidence = self._detector.evidence()
        streams = tuple(
            self._stream_status(name, float(self._counting(name, evidence[index]).max()))
            for index, name in enumerate(STREAMS)
            if name in self._ranks or self._streams[name].values
        )
        parts = _worst([one.condition for one in streams if one.name in PART_STREAMS])
        camera = _worst([one.condition for one in streams if one.name in CAMERA_STREAMS])
        return DriftStatus(
            condition=_worst([parts, camera]),
            parts=parts,
            camera=camera,
            message=_message(parts, camera, streams, self._config.learn),
            streams=streams,
        )

    def _new_detector(self) -> Detector:
        doubts = [self._ranks[name].doubt if name in self._ranks else 0.0 for name in STREAMS]
        return Detector(
            self._config.tolerance + np.asarray(doubts),
            tolerance=self._config.tolerance,
            alike=self._config.alike,
            ceiling=_CEILING * self._alarm_at,
        )

    def _learn(self, name: str, value: float) -> None:
        stream = self._streams[name]
        stream.values.append(float(value))
        if len(stream.values) < self._config.learn:
            return
        # Neighbours resemble one another, so they are fewer witnesses than they are parts.
        count = max(1.0, len(stream.values) / self._config.alike)
        stream.learnt = stream_reference(np.asarray(stream.values), count=count)
        stream.values, stream.is_learning = [], False
        self._ranks[name] = Ranks(name, stream.learnt)
        wealth = self._detector.wealth
        self._detector = self._new_detector()
        self._detector.wealth = wealth

    def _counting(self, name: str, evidence: F64) -> F64:
        """What counts of ``evidence [2]`` for higher and for lower.

        A package's scores are those of statistics that had not seen the part's like; statistics of all images score a
        little lower, the more so the fewer they are. Lower than the package is thus no sign of anything.
        """
        if name in PART_STREAMS and self._streams[name].learnt is None:
            return np.array([evidence[HIGHER], 0.0])
        return evidence

    def _is_off(self, name: str) -> bool:
        rank = self._streams[name].rank
        if rank is None:
            return False
        higher, lower = self._counting(name, np.array([rank - 0.5, 0.5 - rank]))
        return bool(max(higher, lower) > self._config.tolerance)

    def _judge(self, stream: SavedStream, evidence: F64, now: dt.datetime) -> None:
        strongest = int(np.argmax(evidence))
        share = float(evidence[strongest]) / self._alarm_at
        if stream.alarm_direction is None and share >= 1:
            stream.alarm_direction = strongest
            stream.since = now
        elif stream.alarm_direction is None and share >= WARNING_SHARE:
            if stream.warning_direction is None:
                stream.since = now
            stream.warning_direction = strongest
        elif stream.warning_direction is not None and share < WARNING_SHARE**2:
            # Well below where it began, so that it does not come and go with every part.
            stream.warning_direction = None
            if stream.alarm_direction is None:
                stream.since = None

    def _condition(self, name: str) -> Condition:
        stream = self._streams[name]
        if stream.is_learning:
            return Condition.LEARNING
        if stream.alarm_direction is not None:
            return Condition.ALARM
        return Condition.OK if stream.warning_direction is None else Condition.WARNING

    def _direction(self, name: str) -> str | None:
        stream = self._streams[name]
        told = stream.alarm_direction if stream.alarm_direction is not None else stream.warning_direction
        return {HIGHER: "higher", LOWER: "lower"}[told] if told is not None else None

    def _stream_status(self, name: str, evidence: float) -> StreamStatus:
        stream = self._streams[name]
        return StreamStatus(
            name=name,
            condition=self._condition(name),
            direction=self._direction(name),
            rank=None if stream.rank is None else round(stream.rank, 3),
            evidence=round(min(1.0, math.log1p(evidence) / math.log1p(self._alarm_at)), 3),
            since=stream.since,
            is_off=self._is_off(name),
            learnt=len(stream.values) if stream.is_learning else None,
        )


def _worst(conditions: list[Condition]) -> Condition:
    return max(conditions, key=_BADNESS.__getitem__, default=Condition.LEARNING)


def _message(parts: Condition, camera: Condition, streams: tuple[StreamStatus, ...], learn: int) -> str:
    def those(group: tuple[str, ...]) -> str:
        told = [one for one in streams if one.name in group and one.direction is not None]
        over = {one.name: one.condition is Condition.ALARM and not one.is_off for one in told}
        return ", ".join(
            f"{one.name.replace('_', ' ')} {one.direction}{', by now back' if over[one.name] else ''}" for one in told
        )

    worst = _worst([parts, camera])
    if worst is Condition.OK:
        return "parts, camera and light are as they were learnt"
    if worst is Condition.LEARNING:
        done = min((one.learnt for one in streams if one.learnt is not None), default=0)
        return f"learning what this line looks like ({done} of {learn} parts)"
    prefix = "" if worst is Condition.ALARM else "perhaps: "
    if _BADNESS[camera] >= _BADNESS[Condition.WARNING]:
        if not (follows := those(PART_STREAMS)):
            return f"{prefix}camera or light changed: {those(CAMERA_STREAMS)}"
        return f"{prefix}the picture changed (camera, light, or quite other parts): {those(CAMERA_STREAMS)}; {follows}"
    return f"{prefix}the parts changed, camera and light did not: {those(PART_STREAMS)}"
