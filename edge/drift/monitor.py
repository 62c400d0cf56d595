"""The drift monitor of one camera with one model: references, evidence, and status. No clock, no I/O.

The streams of :mod:`edgeflame.drift_reference` are watched one by one and reported in two groups, which need different
action: the camera's (the picture itself has changed: lamp, lens, exposure, mounting) and the parts' (the model sees
other parts while the picture is as before). If both have changed, either may be the cause: very different parts also
change the picture.

An alarm stays until a person clears it or has the reference learnt anew, or another model runs; the status also says
whether the stream is still off. A warning comes at a twentieth of an alarm's evidence, so false warnings are at most
twenty times as frequent as false alarms, and ends by itself.

The evidence
------------
A betting e-detector gives the evidence that a stream of ranks has left its middle.

A part's value becomes its rank u in [0, 1] among the values of good parts. As long as nothing has changed, u is 1/2 on
average. Two hypotheses are bet against, part by part: "the mean of u is at most 1/2 + slack", and "at least 1/2 -
slack". A bet of the share L turns a stake of 1 into

    e = 1 + L (u - 1/2 - slack)            (the other one: 1 + L (1/2 - u - slack))

which is worth at most 1 on average as long as the hypothesis holds, whatever the distribution of u and however parts
depend on earlier ones, as long as each part's mean given those before keeps to the slack. A new stake is laid at every
part, since the change may begin at any: M <- (M + 1) e. M minus the number of parts is then a supermartingale, so the
mean number of parts until M first reaches C is at least C ("average run length", for all time and without correction
for testing after every part). The mean over several shares L is taken; with K detectors each has to reach K C. Both
keep the property.

    J. Shin, A. Ramdas, A. Rinaldo, "E-detectors: a nonparametric framework for sequential change detection",
    New England Journal of Statistics in Data Science, 2024 (Shiryaev-Roberts form)
    I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting", JRSS B, 2024

Parts on a line resemble their neighbours, so their mean given those before does leave the slack for a while. Small
stakes are robust against that: log M falls by L slack per part and wanders with the variance L^2 s^2 f, where
s^2 = 1/12 is that of a rank and f = 1 + 2 (r1 + r2 + ...) the variance inflation by autocorrelation, about the number
of parts in a row that are alike. An excursion of log M by x is then as improbable as exp(-x) or more so as long as

    L <= 2 slack / (s^2 (f - 1))

which is the largest share laid here (and never so large that one part may lose the whole stake). How this holds up,
and what it costs in delay, is measured in benchmarks/drift.

Ranks have no units and no tails, so a single outlier has no more weight than any other part.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping

import msgspec
import numpy as np

from edge.config.inspection import DriftConfig
from edge.status import DriftCondition, DriftStatus, StreamStatus
from edgeflame.drift_reference import (
    CAMERA_STREAMS,
    NUM_QUANTILES,
    PART_STREAMS,
    STREAMS,
    DriftReference,
    StreamReference,
    make_stream_reference,
)
from edgeflame.tensors import F64

NUM_SHARES = 4
"""Number of shares laid at once, each half the one before: small shifts need small ones."""

_LARGEST_STAKE = 0.9
"""One part takes at most this share of what is at stake."""
_RANK_VARIANCE = 1 / 12
HIGHER, LOWER = 0, 1
"""Indices of the evidence against the two hypotheses."""


class Detector:
    """Evidence on S streams.

    Args:
        slack: ``[S]`` how far each stream's mean rank may be from 1/2: the tolerance and the reference's uncertainty.
        tolerance: the configured tolerance, in ranks; bounds the stakes.
        alike: number of parts in a row that are alike; 1 if each is independent.
        ceiling: upper bound of the evidence, so that it does not take too long to fall after a change is over.
    """

    def __init__(self, slack: F64, *, tolerance: float, alike: float, ceiling: float) -> None:
        self._slack = np.asarray(slack, dtype=np.float64)
        self._ceiling = ceiling
        largest = _LARGEST_STAKE / (0.5 + self._slack)
        if alike > 1:
            largest = np.minimum(largest, 2 * tolerance / (_RANK_VARIANCE * (alike - 1)))
        shares = largest[:, None] * 0.5 ** np.arange(NUM_SHARES)
        self._shares: F64 = shares[:, None, :]
        self.wealth: F64 = np.zeros((len(self._slack), 2, NUM_SHARES))
        """``[S, 2, NUM_SHARES]``, for higher and lower; may be set to the values of an earlier run."""

    def update(self, ranks: F64) -> None:
        """Add one part's ``ranks [S]``, 0..1; NaN for a stream without a value."""
        off = ranks - 0.5
        gains = np.stack([off - self._slack, -off - self._slack], axis=1)
        wealth = (self.wealth + 1) * (1 + self._shares * gains[:, :, None])
        is_known = np.isfinite(ranks)[:, None, None]
        self.wealth = np.where(is_known, np.minimum(wealth, self._ceiling), self.wealth)

    def evidence(self) -> F64:
        """Evidence against "not higher" and "not lower", ``[S, 2]``.

        To be compared with the average run length times the number of hypotheses.
        """
        mean: F64 = self.wealth.mean(axis=2)
        return mean


RESOLUTION = {
    "brightness": 2.0,
    "contrast": 1.0,
    "colour": 1.5,
    "sharpness": 0.1,
    "noise": 0.1,
    "shift_x": 0.5,
    "shift_y": 0.5,
}
"""Differences of pictures that are ignored by stream, even if the reference's pictures differ less; in the units of
:mod:`edgeflame.drift_reference`."""

RELATIVE_RESOLUTION = 0.02
"""The same for the parts' streams, as a share of their median: runtimes and precisions differ by so much."""

_LEVELS = np.linspace(0, 1, NUM_QUANTILES)
_REFERENCE_DOUBT = 2.33
"""Number of standard errors allowed for the reference's own median: 99% of references are no further off."""


class Ranks:
    """Computes ranks among the values of one reference.

    Args:
        name: the stream's name.
        reference: the stream's distribution.
    """

    def __init__(self, name: str, reference: StreamReference) -> None:
        self._quantiles = np.asarray(reference.quantiles, dtype=np.float64)
        median = abs(reference.quantiles[NUM_QUANTILES // 2])
        self._step = RELATIVE_RESOLUTION * median if name in PART_STREAMS else RESOLUTION[name]
        self.doubt = _REFERENCE_DOUBT * math.sqrt(1 / (12 * reference.count))
        """How far the true median may be from rank 1/2, since a reference is a sample itself."""

    def rank(self, value: float) -> float:
        """A value's rank, 0..1; 1/2 for the median, and within the resolution of a reference without spread."""
        return (self._share_below(value - self._step) + self._share_below(value + self._step)) / 2

    def _share_below(self, value: float) -> float:
        # Of equal quantiles the middle one is taken; np.interp would take either end.
        first, last = np.searchsorted(self._quantiles, value, "left"), np.searchsorted(self._quantiles, value, "right")
        if last > first:
            return float(_LEVELS[first] + _LEVELS[last - 1]) / 2
        return float(np.interp(value, self._quantiles, _LEVELS))


WARNING_SHARE = 1 / 20
"""Share of an alarm's evidence at which a warning begins."""

MIN_WITNESSES = 30
"""Least number of independent parts of a package's reference. With fewer its uncertainty is greater than the changes to
be found, and a reference is learnt from the line's parts instead."""

_CEILING = 10
"""Upper bound of the evidence, as a multiple of an alarm's."""
_RECENT = 100
"""Number of parts over which the displayed mean rank is smoothed."""


_BADNESS = {DriftCondition.OK: 0, DriftCondition.LEARNING: 1, DriftCondition.WARNING: 2, DriftCondition.ALARM: 3}


class SavedStream(msgspec.Struct, kw_only=True):
    """The saved state of one stream."""

    learnt: StreamReference | None = None
    """The reference learnt from the line's parts, in place of the package's."""
    values: list[float] = []
    """Values of the parts that it is being learnt from."""
    is_learning: bool = False
    wealth: list[list[float]] | None = None
    alarm_direction: int | None = None
    warning_direction: int | None = None
    since: dt.datetime | None = None
    rank: float | None = None


class SavedMonitor(msgspec.Struct, kw_only=True):
    """The saved state of a drift monitor."""

    format: int = 1
    streams: dict[str, SavedStream] = {}


class ConditionChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a stream's condition."""

    stream: str
    before: DriftCondition
    after: DriftCondition
    direction: str | None


class DriftMonitor:
    """Watches all streams of one camera with one model.

    Args:
        config: section ``[drift]``.
        reference: the package's; None: it has none.
        saved: state of an earlier run with the same camera and model.
    """

    def __init__(
        self, config: DriftConfig, reference: DriftReference | None = None, saved: SavedMonitor | None = None
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

    def observe(self, values: Mapping[str, float], now: dt.datetime) -> list[ConditionChange]:
        """Add one part; returns the streams whose condition changed.

        Args:
            values: by stream; streams may be missing.
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
            self._update_condition(stream, self._counting(name, evidence[index]), now)
        changes = []
        for name, old in before.items():
            new = self._condition(name)
            if new is not old:
                changes.append(ConditionChange(stream=name, before=old, after=new, direction=self._direction(name)))
        return changes

    def clear(self) -> None:
        """Clear alarms and warnings, and start again with the same references."""
        for stream in self._streams.values():
            stream.alarm_direction = stream.warning_direction = stream.since = stream.rank = None
        self._detector.wealth[:] = 0

    def relearn(self) -> None:
        """Learn the references of all streams anew from the next parts."""
        self._streams = {name: SavedStream(is_learning=True) for name in STREAMS}
        self._ranks.clear()
        self._detector = self._new_detector()

    def saved(self) -> SavedMonitor:
        """The state from which the next run continues."""
        for index, stream in enumerate(self._streams.values()):
            stream.wealth = self._detector.wealth[index].tolist()
        return SavedMonitor(streams=self._streams)

    def status(self) -> DriftStatus:
        """The status of all streams."""
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
        # Neighbouring parts resemble one another: the number of independent parts is smaller.
        count = max(1.0, len(stream.values) / self._config.alike)
        stream.learnt = make_stream_reference(np.asarray(stream.values), count=count)
        stream.values, stream.is_learning = [], False
        self._ranks[name] = Ranks(name, stream.learnt)
        wealth = self._detector.wealth
        self._detector = self._new_detector()
        self._detector.wealth = wealth

    def _lower_counts(self, name: str) -> bool:
        """Whether lower values than the reference's are evidence.

        A package's reference scores are cross-fitted: of models that had not seen the part. The model fitted on all
        images scores a little lower, more so with few images, so lower scores than the package's are not evidence.
        """
        return name not in PART_STREAMS or self._streams[name].learnt is not None

    def _counting(self, name: str, evidence: F64) -> F64:
        """``evidence [2]`` for higher and for lower, without what does not count."""
        return evidence if self._lower_counts(name) else np.array([evidence[HIGHER], 0.0])

    def _update_condition(self, stream: SavedStream, evidence: F64, now: dt.datetime) -> None:
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
            # Hysteresis, so that a warning does not come and go with every part.
            stream.warning_direction = None
            if stream.alarm_direction is None:
                stream.since = None

    def _condition(self, name: str) -> DriftCondition:
        stream = self._streams[name]
        if stream.is_learning:
            return DriftCondition.LEARNING
        if stream.alarm_direction is not None:
            return DriftCondition.ALARM
        return DriftCondition.OK if stream.warning_direction is None else DriftCondition.WARNING

    def _direction(self, name: str) -> str | None:
        stream = self._streams[name]
        direction = stream.alarm_direction if stream.alarm_direction is not None else stream.warning_direction
        return {HIGHER: "higher", LOWER: "lower"}[direction] if direction is not None else None

    def _stream_status(self, name: str, evidence: float) -> StreamStatus:
        stream, tolerance = self._streams[name], self._config.tolerance
        return StreamStatus(
            name=name,
            condition=self._condition(name),
            direction=self._direction(name),
            rank=None if stream.rank is None else round(stream.rank, 3),
            evidence=round(min(1.0, math.log1p(evidence) / math.log1p(self._alarm_at)), 3),
            since=stream.since,
            usual=(0.5 - tolerance if self._lower_counts(name) else 0.0, 0.5 + tolerance),
            learnt=len(stream.values) if stream.is_learning else None,
        )


def _worst(conditions: list[DriftCondition]) -> DriftCondition:
    return max(conditions, key=_BADNESS.__getitem__, default=DriftCondition.LEARNING)


_AS_LEARNT = "parts, camera and light are as they were learnt"


def _message(parts: DriftCondition, camera: DriftCondition, streams: tuple[StreamStatus, ...], learn: int) -> str:
    def those(group: tuple[str, ...]) -> str:
        drifting = [one for one in streams if one.name in group and one.direction is not None]
        over = {one.name: one.condition is DriftCondition.ALARM and not one.is_off for one in drifting}
        return ", ".join(
            f"{one.name.replace('_', ' ')} {one.direction}{', by now back' if over[one.name] else ''}"
            for one in drifting
        )

    worst = _worst([parts, camera])
    if worst is DriftCondition.OK:
        off = [one for one in streams if one.is_off and one.rank is not None]
        told = [f"{one.name.replace('_', ' ')} {'higher' if (one.rank or 0) > 0.5 else 'lower'}" for one in off]
        return f"no change is sure yet; the last parts: {', '.join(told)}" if told else _AS_LEARNT
    if worst is DriftCondition.LEARNING:
        done = min((one.learnt for one in streams if one.learnt is not None), default=0)
        return f"learning what this line looks like ({done} of {learn} parts)"
    prefix = "" if worst is DriftCondition.ALARM else "perhaps: "
    if _BADNESS[camera] >= _BADNESS[DriftCondition.WARNING]:
        if not (follows := those(PART_STREAMS)):
            return f"{prefix}camera or light changed: {those(CAMERA_STREAMS)}"
        return f"{prefix}the picture changed (camera, light, or quite other parts): {those(CAMERA_STREAMS)}; {follows}"
    return f"{prefix}the parts changed, camera and light did not: {those(PART_STREAMS)}"
