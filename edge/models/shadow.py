"""Two models on the same parts: the shadow run of a candidate, and the canary phase after a switch.

Shadow
------
A second model judges the same parts as the present one, on a thread of its own, and changes nothing.

The line hands parts over without waiting: while the second model is busy they are skipped, and counted. The thread is
niced and computes on one CPU core, so that the present model is never late because of it. Which model is the second is
nothing to it: a candidate before the switch, the model before afterwards.

Canary
------
Whether a model that was switched to proves bad: on its own failures, and on verdicts the model before did not give.

Comparing today's rate of rejects with yesterday's would blame the model for a bad batch. So the model before goes on
judging the same parts, and what counts is the parts where only one of the two rejects: a batch of bad parts is rejected
by both. Each kind (newly failed, newly passed) is tested for being more frequent than was accepted in the shadow run.

The test may look after every part for as long as the trial lasts, so it is an anytime-valid one: a mixture of
likelihood ratios of rates above the accepted one against it. For every true rate up to the accepted one its expected
value never exceeds 1, so the chance that it ever reaches ``1 / alpha`` is at most ``alpha`` (Ville's inequality; see
Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", Statistical Science 2023, section 3).
A model that rejects every part is found out within a few parts.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import numpy as np
import numpy.typing as npt

from edge.frame import Captured
from edge.inspector import InspectorProtocol
from edge.overlay import draw_overlay
from edge.result import Inspected, Reason, Result
from edge.runtimes.interface import Runtime
from edgeflame.background import BackgroundThread
from edgeflame.errors import EdgeFlameError, StorageError
from edgeflame.images import ImageU8, shrink, write_image
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import Disagreement
from edgeflame.state import write_json

SCORES_KEPT = 10_000
"""Pairs for the correlation: the newest."""
_Z95 = 1.959963984540054

FAULTS = frozenset({Reason.RUNTIME_FAILED.value, Reason.SCORE_NOT_FINITE.value, Reason.NOT_SCORED.value})
"""Reasons of ``unknown`` that are the model's own doing and not the image's."""


def is_fault(result: Result) -> bool:
    """Whether the model itself failed on a part."""
    return bool(FAULTS.intersection(result.reasons))


_OF_THE_SCORE = frozenset({Reason.ABOVE_THRESHOLD.value, Reason.REVIEW_BAND.value})


def is_scored(result: Result) -> bool:
    """Whether a verdict is the model's, and not that of a bad image, a missed deadline or a failure."""
    return result.score is not None and _OF_THE_SCORE.issuperset(result.reasons)


class Comparison:
    """Adds up parts that two models judged: the present one, and the other."""

    def __init__(self) -> None:
        self.verdicts: collections.Counter[tuple[str, str]] = collections.Counter()
        """``(present, other)``."""
        self.num_faults = 0
        self.slowdown: float | None = None
        self._ratios: collections.deque[tuple[float, float]] = collections.deque(maxlen=SCORES_KEPT)

    def add(self, present: Result, other: Result) -> float | None:
        """Take a part.

        Returns:
            How far the two are apart, ``|log(score / threshold) difference|``, larger by 1000 where the verdicts
            differ; None if the part does not count: the verdict was not the present model's, or the other failed.
        """
        if not is_scored(present) or present.score is None:
            return None
        if is_fault(other):
            self.num_faults += 1
            return None
        self.verdicts[present.verdict, other.verdict] += 1
        distance = 0.0
        if other.score is not None:
            ours, theirs = present.score / present.threshold, other.score / other.threshold
            self._ratios.append((ours, theirs))
            distance = abs(math.log(max(ours, 1e-9) / max(theirs, 1e-9)))
        return distance + (1000.0 if present.verdict != other.verdict else 0.0)

    @property
    def parts(self) -> int:
        return self.verdicts.total()

    def disagreement(self, *, skipped: int = 0) -> Disagreement:
        """The sum so far."""
        parts = self.parts
        differing = sum(count for (ours, theirs), count in self.verdicts.items() if ours != theirs)
        return Disagreement(
            parts=parts,
            differing=differing,
            newly_failed=self.verdicts["pass", "fail"],
            newly_passed=self.verdicts["fail", "pass"],
            share=differing / parts if parts else None,
            upper=wilson_upper(differing, parts) if parts else None,
            correlation=rank_correlation(np.array(self._ratios, dtype=np.float64).reshape(-1, 2)),
            skipped=skipped,
            faults=self.num_faults,
            slowdown=self.slowdown,
        )


def wilson_upper(count: int, total: int) -> float:
    """Upper end of Wilson's 95% interval of a share (Wilson 1927)."""
    share, z2 = count / total, _Z95 * _Z95
    centre = share + z2 / (2 * total)
    spread = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return min(1.0, (centre + spread) / (1 + z2 / total))


def rank_correlation(pairs: npt.NDArray[np.float64]) -> float | None:
    """Spearman's coefficient of ``[N, 2]``, ties with their mean rank; None below three pairs or without spread."""
    if len(pairs) < 3:
        return None
    ranks = np.stack([_ranks(pairs[:, 0]), _ranks(pairs[:, 1])])
    spread = ranks.std(axis=1)
    if not spread.all():
        return None
    return float(np.clip(np.asarray(np.corrcoef(ranks))[0, 1], -1.0, 1.0))


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = np.asarray(last - (counts - 1) / 2.0)
    return np.asarray(mean_rank[inverse], dtype=np.float64)


ALPHA = 1e-3
"""Chance that a trial rolls back a model whose rates are as accepted, however long it lasts."""
LEAST_RATE = 0.005
"""Accepted at least: one part in two hundred is no proof of anything, whatever was configured."""
FAULT_WINDOW = 100

_NUM_RATES = 16


class CanaryAlarm(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model on trial is bad: a word, and words for people."""

    reason: str
    detail: str


class RateTest:
    """Whether something happens more often than ``accepted``.

    Args:
        accepted: the rate that is all right, above 0 and below 1.
        alpha: chance of a false alarm, ever.
    """

    def __init__(self, accepted: float, alpha: float) -> None:
        rates = np.geomspace(min(1.5 * accepted, 0.99), 0.99, _NUM_RATES)
        self._yes = np.log(rates / accepted)
        self._no = np.log((1 - rates) / (1 - accepted))
        self._log_evidence = np.full(_NUM_RATES, -math.log(_NUM_RATES))
        self._bar = math.log(1 / alpha)
        self.num_yes = 0
        self.num = 0

    def add(self, happened: bool) -> bool:
        """Take a part; whether it is now proven."""
        self.num += 1
        self.num_yes += happened
        self._log_evidence += self._yes if happened else self._no
        return bool(np.logaddexp.reduce(self._log_evidence) >= self._bar)


class Canary:
    """One model on trial, after a switch.

    Args:
        parts: until it is over, judged by both models.
        accepted: share of differing verdicts that was accepted.
        max_faults: of its own, in ``FAULT_WINDOW`` parts.
    """

    def __init__(self, *, parts: int, accepted: float, max_faults: int) -> None:
        rate = max(accepted, LEAST_RATE)
        self.alarm: CanaryAlarm | None = None
        """The first reason to roll back; set by whichever thread comes upon it."""
        self._parts = parts
        self._accepted = accepted
        self._max_faults = max_faults
        self._faults: collections.deque[bool] = collections.deque(maxlen=FAULT_WINDOW)
        self._newly_failed = RateTest(rate, ALPHA / 2)
        self._newly_passed = RateTest(rate, ALPHA / 2)

    @property
    def is_over(self) -> bool:
        """It has judged enough parts together with the model before."""
        return self._newly_failed.num >= self._parts

    def on_result(self, result: Result) -> CanaryAlarm | None:
        """Take every verdict of the model on trial."""
        if Reason.SCORE_NOT_FINITE.value in result.reasons:
            return self._raise("not_finite", f"the score of part {result.part_id} is no finite number")
        self._faults.append(is_fault(result))
        count = sum(self._faults)
        if count < self._max_faults:
            return None
        detail = f"{count} of the last {len(self._faults)} parts without a score: {result.detail or 'no details'}"
        return self._raise("faults", detail)

    def on_pair(self, present: Result, before: Result) -> CanaryAlarm | None:
        """Take a part that the model before could judge as well."""
        if not (is_scored(before) and is_scored(present)):
            return None
        rejects, did_reject = present.verdict == "fail", before.verdict == "fail"
        for test, happened, reason, what in (
            (self._newly_failed, rejects and not did_reject, "rejects_too_much", "fails parts that the model before"),
            (
                self._newly_passed,
                did_reject and not rejects,
                "rejects_too_little",
                "does not fail parts that the model before",
            ),
        ):
            if test.add(happened):
                detail = (
                    f"it {what} {'passed' if test is self._newly_failed else 'failed'}: {test.num_yes} of {test.num}; "
                    f"{self._accepted:.2%} was accepted"
                )
                return self._raise(reason, detail)
        return None

    def _raise(self, reason: str, detail: str) -> CanaryAlarm:
        self.alarm = self.alarm or CanaryAlarm(reason=reason, detail=detail)
        return self.alarm


log = EventLog("models")

QUEUE_PARTS = 2
"""Waiting for the second model; a part more is skipped. They hold whole camera images."""
NICENESS = 10
"""Of the thread: it takes what the line leaves."""
PICTURES = 12
PICTURE_SIDE = 640
TIMED_RUNS = 7

_REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class ShadowModel:
    """The second model.

    Attributes:
        inspectors: one for each camera, all on runtimes of the shadow's own.
        slowdown: its computing time over the present one's; None: not measured.
    """

    inspectors: Mapping[str, InspectorProtocol]
    slowdown: float | None = None


class ShadowProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is."""

    disagreement: Disagreement
    problem: str | None = None
    """The second model cannot be tried: why."""


@final
class Shadow:
    """One shadow run; begins at once, and is to be closed.

    Args:
        open_shadow: makes the second model; called on the shadow's own thread.
        folder: for pictures and the report; None: none are kept.
        canary: shown every part that both have judged.
        wake: called when there is something new worth acting upon.
    """

    def __init__(
        self,
        open_shadow: Callable[[], ShadowModel],
        *,
        folder: Path | None = None,
        canary: Canary | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_shadow = open_shadow
        self._folder = folder
        self._canary = canary
        self._wake = wake
        self._queue: queue.Queue[tuple[Captured, Inspected] | None] = queue.Queue(QUEUE_PARTS)
        self._lock = threading.Lock()
        self._comparison = Comparison()
        self._num_skipped = 0
        self._problem: str | None = None
        self._is_ready = False
        self._worst: list[tuple[float, int, str]] = []
        self._thread = BackgroundThread("shadow", self._run, wake=self._offer_end)
        self._thread.start()

    def offer(self, captured: Captured, inspected: Inspected) -> None:
        """A part that the present model has judged; takes microseconds."""
        if self._thread.stop.is_set() or captured.frame.image_bgr is None:
            return
        try:
            if not self._is_ready:
                raise queue.Full
            self._queue.put_nowait((captured, inspected))
        except queue.Full:
            self._num_skipped += 1

    def progress(self) -> ShadowProgress:
        """How far it is."""
        with self._lock:
            return ShadowProgress(
                disagreement=self._comparison.disagreement(skipped=self._num_skipped),
                problem=self._problem,
            )

    def close(self, *, timeout_s: float = 1.0) -> None:
        """End it; a part in hand may still be computed, and counts no more."""
        self._thread.close(timeout_s)

    def _offer_end(self) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    # The rest runs on the shadow's thread.

    def _run(self, stop: threading.Event) -> None:
        # Linux knows priorities by thread. A machine that forbids it is one that shares nothing worth sharing.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            second = self._open_shadow()
            with self._lock:
                self._comparison.slowdown = second.slowdown
            self._is_ready = True
            while not stop.is_set():
                try:
                    item = self._queue.get(timeout=0.5)
                except queue.Empty:
                    continue
                if item is None or stop.is_set():
                    break
                self._judge(second, *item)
        except EdgeFlameError as exc:
            self._give_up(str(exc))
        except Exception as exc:  # noqa: BLE001 - a thread's outermost frame: a model that breaks it is no good
            log.error("shadow_failed", reason=repr(exc))
            self._give_up(f"an unexpected error: {exc!r}")

    def _give_up(self, problem: str) -> None:
        with self._lock:
            self._problem = problem
        self._wake()

    def _judge(self, second: ShadowModel, captured: Captured, inspected: Inspected) -> None:
        present = inspected.result
        inspector = second.inspectors.get(present.camera)
        if inspector is None:
            return
        # Parts are skipped, so what is known of the camera from one part to the next is the present model's alone.
        other = inspector.inspect_photograph(captured)
        with self._lock:
            distance = self._comparison.add(present, other.result)
            # On trial is the present model; the second is the one before.
            alarm = None if self._canary is None else self._canary.on_pair(present, other.result)
        if distance is not None and distance > 0 and self._folder is not None:
            self._keep_picture(self._folder, distance, inspected, other)
        if alarm is not None or distance is None or self._comparison.parts % 10 == 0:
            self._wake()

    def _keep_picture(self, folder: Path, distance: float, present: Inspected, other: Inspected) -> None:
        if len(self._worst) == PICTURES and distance <= self._worst[0][0]:
            return
        result = present.result
        camera = "".join(sign if sign.isalnum() else "_" for sign in result.camera)
        name = f"{camera}-{result.sequence:08d}-{result.verdict}-{other.result.verdict}.png"
        pictures = [_picture(one) for one in (present, other)]
        if any(picture is None for picture in pictures):
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / name, np.hstack([picture for picture in pictures if picture is not None]))
            heapq.heappush(self._worst, (distance, result.sequence, name))
            while len(self._worst) > PICTURES:
                (folder / heapq.heappop(self._worst)[2]).unlink(missing_ok=True)
        except (OSError, StorageError) as exc:
            # Evidence for people; the numbers decide.
            log.warning("shadow_picture_not_kept", reason=str(exc))


def write_shadow_report(folder: Path, disagreement: Disagreement) -> None:
    """What a shadow run came to, as JSON beside its pictures; not worth failing for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _REPORT, disagreement, indent=2)
    except (OSError, StorageError) as exc:
        log.warning("shadow_report_not_kept", reason=str(exc))


def slowdown_of(runtime: Runtime, present: Runtime) -> float:
    """How many times the present model's computing time for an image another takes.

    By the calling thread's own CPU time, both alternately: what else the machine does plays no part. Both runtimes
    compute on the calling thread alone.
    """
    ratios = []
    for index in range(TIMED_RUNS + 1):
        ours, theirs = _cpu_s(present), _cpu_s(runtime)
        if index:
            # The first is for the allocations.
            ratios.append(theirs / max(ours, 1e-9))
    return float(np.median(ratios))


def _cpu_s(runtime: Runtime) -> float:
    image = np.full((1, *runtime.input_size, 3), 127, dtype=np.uint8)
    begun = time.thread_time()
    runtime.score(image)
    return time.thread_time() - begun


def _picture(inspected: Inspected) -> ImageU8 | None:
    """The present model's picture on the left, the other's on the right; both see the same area, or may not."""
    if inspected.image is None:
        return None
    picture = shrink(inspected.image, PICTURE_SIDE)
    if inspected.anomaly_map is not None:
        picture = shrink(draw_overlay(picture, inspected.anomaly_map, inspected.result.threshold), PICTURE_SIDE)
    canvas = np.zeros((PICTURE_SIDE, PICTURE_SIDE, 3), dtype=np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvas
