"""Status values of cameras, of the line (the daemon) and of a run: for the page, metrics, the broker and commands.

They are filled in elsewhere (drift, self-tests, rollout of models, delivery). :class:`Tally` adds up a run's results.
"""

from __future__ import annotations

import collections
import datetime as dt
import enum
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from edge.result import Result
from edgeflame.mqtt.release_messages import Disagreement, ProductModels


class PartCounts(msgspec.Struct, kw_only=True):
    """Counts of a camera's parts by what happened to them. One thread at a time writes a number, any may read it."""

    triggers: int = 0
    """Parts that were announced."""
    triggers_lost: int = 0
    """Triggers that could not be taken since too many parts waited."""
    missing: int = 0
    """Parts that never came, by the numbers of the others."""
    duplicates: int = 0
    """Parts whose number or name had come before."""
    late: int = 0
    """Parts without a verdict at their deadline."""
    late_answers: int = 0
    """Answers of the model that came after the part's deadline, and did not count."""


class DriftCondition(str, enum.Enum):
    """Drift of one stream of measurements, or the worst of several."""

    LEARNING = "learning"
    OK = "ok"
    WARNING = "warning"
    ALARM = "alarm"


class StreamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Drift of one stream of measurements."""

    name: str
    condition: DriftCondition
    direction: str | None
    """``higher`` or ``lower`` with a warning or an alarm, else None."""
    rank: float | None
    """Rank of the typical recent part among the reference's parts, 0..1; 0.5 is the middle."""
    evidence: float
    """Evidence of drift, 0..1 on a logarithmic scale; 1 is an alarm."""
    since: dt.datetime | None
    """When the warning or alarm began."""
    usual: tuple[float, float]
    """The ranks that are within the tolerance. For scores it begins at 0 where lower ones say nothing: those of a
    package's reference are of models that had not seen the part, and a little higher."""
    learnt: int | None
    """Number of parts learnt from so far; None when not learning."""

    @property
    def is_off(self) -> bool:
        """Whether the last parts are beyond the tolerance."""
        return self.rank is not None and not self.usual[0] <= self.rank <= self.usual[1]


class DriftStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Drift of one camera with one model."""

    condition: DriftCondition
    """The worst of all streams."""
    parts: DriftCondition
    """The worst of the streams that describe the parts."""
    camera: DriftCondition
    """The worst of the streams that describe the camera's images."""
    message: str
    """For people, without a full stop."""
    streams: tuple[StreamStatus, ...]
    """The streams with a reference, or with one being learnt."""


Expected = Literal["good", "bad"]


class GoldenCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One golden part's verdict against what it should be."""

    part: str
    """The file, or the part's id."""
    expected: str
    """``pass`` or ``fail``."""
    verdict: str
    ratio: float | None
    """Score over threshold."""
    reasons: tuple[str, ...] = ()
    """The verdict's reasons."""

    @property
    def is_right(self) -> bool:
        return self.verdict == self.expected


class GoldenReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of one self-test."""

    camera: str
    product: str
    model: str
    kind: Literal["photographs", "part"]
    """``part``: a golden part before the camera, which tests lamp and lens as well."""
    at: dt.datetime
    """UTC."""
    passed: bool
    message: str
    """For people, without a full stop."""
    checks: tuple[GoldenCheck, ...]


class GoldenStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A camera's last self-test."""

    last: GoldenReport | None = None
    acknowledged: bool = False
    """Whether a person has acknowledged that the last test failed."""

    @property
    def word(self) -> str | None:
        """``passed``, ``failed`` or ``acknowledged``; None before the first test."""
        if self.last is None:
            return None
        return "passed" if self.last.passed else "acknowledged" if self.acknowledged else "failed"

    @property
    def is_failing(self) -> bool:
        """Whether the last test failed and has not been acknowledged."""
        return self.last is not None and not self.last.passed and not self.acknowledged


class DestinationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of the delivery to one destination."""

    attempted: int
    """Highest number that may have been sent."""
    acknowledged: int
    """Highest number that has surely arrived, with all before it."""
    lost: int
    """Results that had to be deleted before they were delivered."""
    waiting: int
    """Results still to be delivered."""


class ShadowStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison of a product's present model with a second one, if one runs beside it."""

    product: str
    role: Literal["candidate", "before"]
    """What the second model is: a candidate, or the model before a switch."""
    on_trial: bool
    """Whether the present model is on trial after a switch."""
    found: Disagreement | None
    """The comparison so far; None: there is no second model."""


class RolloutStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The rollout of models on a daemon."""

    beside: tuple[ShadowStatus, ...] = ()
    fates: dict[tuple[str, str], int] = {}
    """Number of releases since the start by product and fate, ``(product, fate)``."""


DEFAULT_CAMERA = "camera"
"""Name of the one camera of a daemon whose configuration names none."""


class CameraStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The status of one camera; the page, messages and metrics are all made from it."""

    camera: str
    source: str
    """Without passwords."""
    product: str
    model: str
    """First 12 digits of the package's SHA-256."""
    provider: str
    """Name of the runtime that computes the scores."""
    threshold: float
    """Raw distance."""
    threshold_set: bool = False
    """The threshold was set by command, and is not that of the configuration or the package."""
    paused: bool = False
    ended: bool = False
    """Whether its source has come to its end."""
    waits: bool = False
    """Whether its source is a folder in which files arrive: no file is then no fault."""
    trial: bool = False
    """Whether a model on trial judges its parts."""
    problem: str | None = None
    """Why no parts come from it; None while they do."""
    parts: int = 0
    """Number of parts inspected since the start."""
    dropped: dict[str, int] = {}
    """Number of frames dropped without inspection, by reason."""
    drift: DriftStatus | None = None
    """None where drift is not watched."""
    golden: GoldenStatus | None = None
    not_ready: tuple[str, ...] = ()
    """Reasons for people why its verdicts cannot be relied on, such as a failed self-test."""
    models: ProductModels | None = None
    """Its product's released models: the running one, the candidate, and earlier ones; None without ``[models]``."""
    counts: PartCounts = msgspec.field(default_factory=PartCounts)
    """Counts of its parts."""
    trigger_up: bool | None = None
    """Whether its trigger source works; None where every frame is a part."""

    @property
    def trouble(self) -> str | None:
        """Why its verdicts cannot be relied on now, for people; None if they can."""
        return "paused" if self.paused else "; ".join(self.not_ready) or self.problem

    def why_not_ready(self, *, last_part_s: float | None, stale_after_s: float) -> str | None:
        """Why it is not ready, for people; None if it is.

        Args:
            last_part_s: seconds since the last part was inspected; None: there was none since the start.
            stale_after_s: a last part longer ago than this makes it not ready; not where files are waited for.
        """
        if self.ended:
            return None
        if (trouble := self.trouble) is not None:
            return trouble
        if self.waits:
            return None
        if last_part_s is None:
            return "no part has been judged since the start"
        return f"no part for {last_part_s:.0f} s" if last_part_s > stale_after_s else None


class CameraState(msgspec.Struct, frozen=True, kw_only=True):
    """What one camera of the line runs, as published."""

    name: str
    product: str
    model: str
    """First 12 digits of the package's SHA-256."""
    threshold: float
    source: str
    paused: bool = False
    drift: str | None = None
    """``learning``, ``ok``, ``warning`` or ``alarm``; null where it is not watched, or before the first part."""
    drift_message: str | None = None
    """The drift in words, for people."""
    golden: str | None = None
    """Last self-test: ``passed``, ``failed``, or ``acknowledged`` (failed, and a person has confirmed seeing it)."""
    threshold_set: bool = False
    """The threshold was set by command, and is not that of the configuration or the package."""

    @classmethod
    def of(cls, status: CameraStatus) -> CameraState:
        """The published part of a camera's status."""
        return cls(
            name=status.camera,
            product=status.product,
            model=status.model,
            threshold=status.threshold,
            source=status.source,
            paused=status.paused,
            drift=None if status.drift is None else status.drift.condition.value,
            drift_message=None if status.drift is None else status.drift.message,
            golden=None if status.golden is None else status.golden.word,
            threshold_set=status.threshold_set,
        )


class LineState(msgspec.Struct, frozen=True, kw_only=True):
    """What the line runs; a retained message. The fields outside ``cameras`` repeat those of the first camera."""

    online: bool
    boot: str
    product: str
    model: str
    """First 12 digits of the package's SHA-256."""
    threshold: float
    source: str
    cameras: tuple[CameraState, ...] = ()

    @classmethod
    def of(cls, statuses: Sequence[CameraStatus], *, boot: str) -> LineState:
        """The state to publish while the daemon runs; ``statuses`` holds one camera at least."""
        first = statuses[0]
        return cls(
            online=True,
            boot=boot,
            product=first.product,
            model=first.model,
            threshold=first.threshold,
            source=first.source,
            cameras=tuple(map(CameraState.of, statuses)),
        )


LATENCY_WINDOW = 100_000
"""Number of last parts that quantiles are computed from, which bounds the memory."""


class LatencyQuantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Capture to verdict, in milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """Verdicts against the labels of the parts that have one."""

    right: int
    wrong: int
    false_rejects: int
    """Good parts that failed."""
    missed: int
    """Defective parts that passed."""
    undecided: int
    """``unknown`` verdicts."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of one run."""

    parts: int
    passed: int
    failed: int
    unknown: int
    reasons: dict[str, int]
    """Number of failed and unknown parts by reason."""
    dropped: dict[str, int]
    """Number of frames dropped without inspection, by reason."""
    duration_s: float
    latency_ms: LatencyQuantiles | None
    truth: Truth | None
    evidence_lost: int = 0
    """Pictures of rejected parts that could not be stored, or had to make room for results."""
    undelivered: dict[str, int] = {}
    """Number of results kept for the next start, by destination."""
    counts: PartCounts = msgspec.field(default_factory=PartCounts)
    """Counts of announced and numbered parts, all cameras together."""


class Tally:
    """Adds up the results of a run; thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()
        self._verdicts: collections.Counter[str] = collections.Counter()
        self._reasons: collections.Counter[str] = collections.Counter()
        self._truth: collections.Counter[str] = collections.Counter()
        self._latencies: collections.deque[float] = collections.deque(maxlen=LATENCY_WINDOW)

    @property
    def parts(self) -> int:
        return self._verdicts.total()

    def add(self, result: Result) -> int:
        """Count a result; returns the number so far."""
        with self._lock:
            self._add(result)
            return self.parts

    def _add(self, result: Result) -> None:
        self._verdicts[result.verdict] += 1
        self._reasons.update(result.reasons)
        self._latencies.append(result.latency_ms)
        if result.label is None:
            return
        if result.is_right is None:
            self._truth["undecided"] += 1
        elif result.is_right:
            self._truth["right"] += 1
        else:
            self._truth["missed" if result.verdict == "pass" else "false_rejects"] += 1

    def summary(self, *, dropped: Mapping[str, int]) -> Summary:
        """The sum so far."""
        truth = self._truth
        return Summary(
            parts=self.parts,
            passed=self._verdicts["pass"],
            failed=self._verdicts["fail"],
            unknown=self._verdicts["unknown"],
            reasons=dict(self._reasons),
            dropped=dict(dropped),
            duration_s=round(self._clock() - self._started, 3),
            latency_ms=_latency(self._latencies),
            truth=Truth(
                right=truth["right"],
                wrong=truth["missed"] + truth["false_rejects"],
                false_rejects=truth["false_rejects"],
                missed=truth["missed"],
                undecided=truth["undecided"],
            )
            if truth
            else None,
        )


def _latency(latencies_ms: collections.deque[float]) -> LatencyQuantiles | None:
    if not latencies_ms:
        return None
    p50, p95, p99, largest = (round(float(value), 3) for value in np.percentile(latencies_ms, [50, 95, 99, 100]))
    return LatencyQuantiles(p50=p50, p95=p95, p99=p99, max=largest)
