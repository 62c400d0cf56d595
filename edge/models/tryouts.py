"""Shadow runs before a switch and trials after it: begun, looked at, and acted upon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import final

import numpy as np

from edge.models import record as records
from edge.models.book import Book, Slot, utc_now
from edge.models.config import ModelsConfig
from edge.models.passing import LineTimes, rule
from edge.models.record import ProductRecord
from edge.models.seats import Seats
from edge.models.shadow import Progress, Shadow, write_report
from edge.models.store import PackageStore
from edge.models.trial import Alarm, Trial
from edgeflame.console import EventLog
from edgeflame.errors import EdgeFlameError
from edgeflame.releases.messages import Disagreement, Release

log = EventLog("models")

MIN_LATENCIES = 20
"""Fewer parts say nothing about how long the present model takes."""


@final
class Tryouts:
    """Looks after the second models of all products.

    Args:
        config: section ``[models]``.
        book: decides.
        seats: open second models.
        store: packages on disk.
        deadline_ms: of a part; None: there is none.
        wake: called, from any thread, when there is something to look at.
    """

    def __init__(
        self,
        config: ModelsConfig,
        book: Book,
        *,
        seats: Seats,
        store: PackageStore,
        deadline_ms: float | None,
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._book = book
        self._seats = seats
        self._store = store
        self._deadline_ms = deadline_ms
        self._wake = wake

    def look(self) -> None:
        """See how shadow runs and trials stand, and act on it; called again and again."""
        for product, slot in self._book.slots.items():
            entry = self._book.entry(product)
            candidate = entry.candidate
            if candidate is not None and candidate.stage == "shadow" and slot.judges is not None:
                self._look_at_shadow(product, slot, candidate.release)
            elif entry.on_trial and entry.present is not None:
                self._look_at_trial(product, slot, entry)
            self._book.call_back_strays(product, slot)

    def _look_at_shadow(self, product: str, slot: Slot, release: Release) -> None:
        needed = max(self._config.shadow_parts, release.shadow_parts)
        sha256 = release.manifest.sha256
        if needed == 0:
            self._passed(product, None)
            return
        if slot.shadow is None or slot.trial is not None:
            self._book.stop_shadow(product)
            slot.shadow = self._start_shadow(slot, self._store.path(sha256), self._store.shadow_folder(sha256), None)
            log.info("shadow_begun", product=product, sha256=sha256[:12], parts=needed)
        progress = slot.shadow.progress()
        found = progress.disagreement
        if progress.problem is not None:
            self._book.drop(product, "refused", "not_opened", progress.problem, found)
            return
        # Copied first: the line goes on adding to it.
        latencies = list(slot.latencies)
        latency_ms = float(np.quantile(latencies, 0.95)) if len(latencies) >= MIN_LATENCIES else None
        times = LineTimes(latency_ms=latency_ms, deadline_ms=self._deadline_ms)
        ruling = rule(found, needed=needed, config=self._config, times=times)
        if ruling is None:
            return
        self._book.stop_shadow(product)
        write_report(self._store.shadow_folder(sha256), found)
        if ruling.passed:
            self._passed(product, found)
        else:
            self._book.drop(product, "refused", ruling.reason, ruling.detail, found)

    def _passed(self, product: str, found: Disagreement | None) -> None:
        log.info("shadow_passed", product=product, share=None if found is None else found.share)
        if self._config.auto:
            self._book.switch(product, found)
        else:
            self._book.write(product, records.advance(self._book.entry(product), "waiting", found))

    def _look_at_trial(self, product: str, slot: Slot, entry: ProductRecord) -> None:
        assert entry.present is not None
        if self._config.trial_parts == 0:
            self._book.write(product, records.confirm(entry, utc_now(), None))
            return
        if slot.trial is None:
            self._start_trial(product, slot, entry)
            return
        progress = None if slot.shadow is None else slot.shadow.progress()
        alarm = slot.trial.alarm
        if alarm is not None:
            log.error("trial_failed", product=product, reason=alarm.reason, detail=alarm.detail)
            self._end_trial_badly(product, alarm, progress)
        elif slot.trial.is_over or (progress is not None and progress.problem is not None):
            if progress is not None and progress.problem is not None:
                # The model before cannot judge along; there is nothing to compare with.
                log.warning("trial_cut_short", product=product, reason=progress.problem)
            self._book.write(product, records.confirm(entry, utc_now(), _of(progress)))
            self._book.stop_shadow(product)
            slot.before = None
            log.info("model_confirmed", product=product, sha256=entry.present_sha256[:12])

    def _start_trial(self, product: str, slot: Slot, entry: ProductRecord) -> None:
        self._book.stop_shadow(product)
        slot.trial = Trial(
            parts=self._config.trial_parts,
            accepted=self._config.max_disagreement,
            max_faults=self._config.max_faults,
        )
        before = entry.previous[0].sha256 if entry.previous else None
        file = Path(slot.configured.file) if before is None else self._store.path(before)
        slot.shadow = self._start_shadow(slot, file, None, slot.trial)
        log.info("trial_begun", product=product, sha256=entry.present_sha256[:12], parts=self._config.trial_parts)

    def _end_trial_badly(self, product: str, alarm: Alarm, progress: Progress | None) -> None:
        try:
            self._book.roll_back(product, "rolled_back", alarm.reason, alarm.detail, found=_of(progress))
        except EdgeFlameError as exc:
            # Nothing earlier can be opened; a model that proved bad is still better than none, and says so.
            log.error("roll_back_failed", product=product, reason=str(exc))
            self._book.stop_shadow(product)
            self._book.write(product, records.confirm(self._book.entry(product), utc_now(), _of(progress)))

    def _start_shadow(self, slot: Slot, file: Path, folder: Path | None, trial: Trial | None) -> Shadow:
        name, present = slot.configured.name, self._book.file(slot)
        return Shadow(lambda: self._seats.open_second(name, file, present), folder=folder, trial=trial, wake=self._wake)


def _of(progress: Progress | None) -> Disagreement | None:
    return None if progress is None else progress.disagreement
