"""Two models on the same parts: the shadow run of a candidate, and the canary phase after a switch.

Shadow
------
A second model inspects the same parts as the present one on a thread of its own; its verdicts have no effect.

Camera workers hand parts over without waiting: while the second model is busy, parts are skipped and counted. The
thread is niced and computes on one CPU core, so that the present model is not delayed by it. The second model is a
candidate before a switch, and the model before it afterwards.

Canary
------
After a switch, the new model is rolled back if it fails itself, or gives other verdicts than the one before too often.

Comparing today's rate of rejects with yesterday's would blame the model for a bad batch. So the model before goes on
inspecting the same parts, and the parts that only one of the two rejects are counted: a bad batch is rejected by both.
Each kind (newly failed, newly passed) is tested for being more frequent than was accepted in the shadow run.

The test is evaluated after every part for as long as the trial lasts, so it is an anytime-valid one: a mixture of
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
from edgeflame.mqtt.release_messages import Disagreement
from edgeflame.state import write_json

SCORES_KEPT = 10_000
"""Number of newest pairs of scores kept for the correlation."""
_Z95 = 1.959963984540054

FAULTS = frozenset({Reason.RUNTIME_FAILED.value, Reason.SCORE_NOT_FINITE.value, Reason.NOT_SCORED.value})
"""Reasons of ``unknown`` that the model causes, and not the image."""


def is_fault(result: Result) -> bool:
    """Whether the model itself failed on a part."""
    return bool(FAULTS.intersection(result.reasons))


_OF_THE_SCORE = frozenset({Reason.ABOVE_THRESHOLD.value, Reason.REVIEW_BAND.value})


def is_scored(result: Result) -> bool:
    """Whether a verdict is the model's, and not that of a bad image, a missed deadline or a failure."""
    return result.score is not None and _OF_THE_SCORE.issuperset(result.reasons)


class Comparison:
    """Adds up parts that two models inspected: the present one and the other."""

    def __init__(self) -> None:
        self.verdicts: collections.Counter[tuple[str, str]] = collections.Counter()
        """``(present, other)``."""
        self.num_faults = 0
        self.slowdown: float | None = None
        self._ratios: collections.deque[tuple[float, float]] = collections.deque(maxlen=SCORES_KEPT)

    def add(self, present: Result, other: Result) -> float | None:
        """Add a part.

        Returns:
            Distance of the two, ``|log(score / threshold) difference|``, plus 1000 if the verdicts differ; None if the
            part does not count: the present model's score did not decide the verdict, or the other model failed.
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
        """The comparison so far."""
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
    """Upper end of Wilson's 95% interval of the share ``count / total`` (Wilson 1927)."""
    share, z2 = count / total, _Z95 * _Z95
    centre = share + z2 / (2 * total)
    spread = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return min(1.0, (centre + spread) / (1 + z2 / total))


def rank_correlation(pairs: npt.NDArray[np.float64]) -> float | None:
    """Spearman's coefficient of ``[N, 2]``, ties get their mean rank; None with fewer than 3 pairs or no spread."""
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
"""Least accepted rate of differing verdicts, even if a smaller one is configured: fewer prove nothing."""
FAULT_WINDOW = 100
"""Number of last parts in which the model's own failures are counted."""

_NUM_RATES = 16


class CanaryAlarm(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model on trial has to be rolled back."""

    reason: str
    """One word for programs."""
    detail: str
    """The reason for people."""


class RateTest:
    """Whether something happens more often than ``accepted``.

    Args:
        accepted: the accepted rate, above 0 and below 1.
        alpha: chance that a rate up to the accepted one ever raises an alarm.
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
        """Add a part; returns whether the rate is proven to be higher now."""
        self.num += 1
        self.num_yes += happened
        self._log_evidence += self._yes if happened else self._no
        return bool(np.logaddexp.reduce(self._log_evidence) >= self._bar)


class Canary:
    """One model on trial, after a switch.

    Args:
        parts: number of parts, inspected by both models, after which it is over.
        accepted: accepted share of differing verdicts.
        max_faults: number of its own failures in ``FAULT_WINDOW`` parts that raises an alarm.
    """

    def __init__(self, *, parts: int, accepted: float, max_faults: int) -> None:
        rate = max(accepted, LEAST_RATE)
        self.alarm: CanaryAlarm | None = None
        """The first reason to roll back; set on the camera's or the shadow's thread."""
        self._parts = parts
        self._accepted = accepted
        self._max_faults = max_faults
        self._faults: collections.deque[bool] = collections.deque(maxlen=FAULT_WINDOW)
        self._newly_failed = RateTest(rate, ALPHA / 2)
        self._newly_passed = RateTest(rate, ALPHA / 2)

    @property
    def is_over(self) -> bool:
        """Whether both models have inspected enough parts."""
        return self._newly_failed.num >= self._parts

    def on_result(self, result: Result) -> CanaryAlarm | None:
        """Add a result of the model on trial; returns the alarm if there is reason for one."""
        if Reason.SCORE_NOT_FINITE.value in result.reasons:
            return self._raise("not_finite", f"the score of part {result.part_id} is no finite number")
        self._faults.append(is_fault(result))
        count = sum(self._faults)
        if count < self._max_faults:
            return None
        detail = f"{count} of the last {len(self._faults)} parts without a score: {result.detail or 'no details'}"
        return self._raise("faults", detail)

    def on_pair(self, present: Result, before: Result) -> CanaryAlarm | None:
        """Add a part that both models have inspected; returns the alarm if there is reason for one."""
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
"""Parts that wait for the second model, with whole camera images; further ones are skipped."""
NICENESS = 10
"""Niceness of the thread, so that camera workers come first."""
PICTURES = 12
"""Number of pictures kept: the parts with the largest distance."""
PICTURE_SIDE = 640
TIMED_RUNS = 7

_REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class ShadowModel:
    """The second model.

    Attributes:
        inspectors: one for each camera by name, on a runtime of the shadow's own.
        slowdown: computing time divided by the present model's; None: not measured.
    """

    inspectors: Mapping[str, InspectorProtocol]
    slowdown: float | None = None


class ShadowProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a shadow run."""

    disagreement: Disagreement
    problem: str | None = None
    """Why the second model cannot be run; None if it can."""


@final
class Shadow:
    """One shadow run; starts at once, and must be closed.

    Args:
        open_shadow: opens the second model; called on the shadow's own thread.
        folder: for pictures; None: none are kept.
        canary: gets every part that both models have inspected; None: there is no trial.
        wake: called, on the shadow's thread, when the progress should be looked at.
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
        """Queue a part that the present model has inspected, or skip it; takes microseconds."""
        if self._thread.stop.is_set() or captured.frame.image_bgr is None:
            return
        try:
            if not self._is_ready:
                raise queue.Full
            self._queue.put_nowait((captured, inspected))
        except queue.Full:
            self._num_skipped += 1

    def progress(self) -> ShadowProgress:
        """The progress so far."""
        with self._lock:
            return ShadowProgress(
                disagreement=self._comparison.disagreement(skipped=self._num_skipped),
                problem=self._problem,
            )

    def close(self, *, timeout_s: float = 1.0) -> None:
        """End the run; a part may still be in work afterwards, and does not count."""
        self._thread.close(timeout_s)

    def _offer_end(self) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    # The rest runs on the shadow's thread.

    def _run(self, stop: threading.Event) -> None:
        # Linux has priorities by thread. Where it is forbidden, the thread runs with normal priority.
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
        # Parts are skipped, so the checks across frames (a frozen camera) cannot be made here.
        other = inspector.inspect_photograph(captured)
        with self._lock:
            distance = self._comparison.add(present, other.result)
            # In a trial, the present model is the new one, and the second model the one before.
            alarm = None if self._canary is None else self._canary.on_pair(present, other.result)
        if distance is not None and distance > 0 and self._folder is not None:
            self._keep_picture(self._folder, distance, inspected, other)
        if alarm is not None or distance is None or self._comparison.parts % 10 == 0:
            self._wake()

    def _keep_picture(self, folder: Path, distance: float, present: Inspected, other: Inspected) -> None:
        if len(self._worst) == PICTURES and distance <= self._worst[0][0]:
            return
        result = present.result
        name = f"{result.camera}-{result.sequence:08d}-{result.verdict}-{other.result.verdict}.png"
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
            # Pictures are for people only; the decision does not need them.
            log.warning("shadow_picture_not_kept", reason=str(exc))


def write_shadow_report(folder: Path, disagreement: Disagreement) -> None:
    """Write the comparison of a shadow run as JSON beside its pictures; a failure is only logged."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _REPORT, disagreement, indent=2)
    except (OSError, StorageError) as exc:
        log.warning("shadow_report_not_kept", reason=str(exc))


def slowdown_of(runtime: Runtime, present: Runtime) -> float:
    """Computing time of ``runtime`` for an image divided by that of ``present``.

    The CPU time of the calling thread is measured, of both alternately, so other load on the machine does not matter.
    Both runtimes must compute on the calling thread alone.
    """
    ratios = []
    for index in range(TIMED_RUNS + 1):
        ours, theirs = _cpu_s(present), _cpu_s(runtime)
        if index:
            # The first run is for the allocations.
            ratios.append(theirs / max(ours, 1e-9))
    return float(np.median(ratios))


def _cpu_s(runtime: Runtime) -> float:
    image = np.full((1, *runtime.input_size, 3), 127, dtype=np.uint8)
    begun = time.thread_time()
    runtime.score(image)
    return time.thread_time() - begun


def _picture(inspected: Inspected) -> ImageU8 | None:
    """One model's picture with its heat map, on a square of ``PICTURE_SIDE``; None if there is no image."""
    if inspected.image is None:
        return None
    picture = shrink(inspected.image, PICTURE_SIDE)
    if inspected.anomaly_map is not None:
        picture = shrink(
            draw_overlay(picture, inspected.anomaly_map, inspected.result.threshold, shown=inspected.shown_map),
            PICTURE_SIDE,
        )
    canvas = np.zeros((PICTURE_SIDE, PICTURE_SIDE, 3), dtype=np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvas
