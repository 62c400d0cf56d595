"""Decides about a line's models: what the fleet, people and parts say of them comes in here. One thread calls it.

Shadow runs before a switch and canary phases after it are begun, looked at, and acted upon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import numpy as np

from edge.config.outputs import ModelsConfig
from edge.frame import Captured
from edge.models import state as rollout_state
from edge.models.rollout import Deployment, LatencyBudget, Rollouts, RolloutSlot, check_acceptance, utc_now
from edge.models.shadow import Canary, CanaryAlarm, Shadow, ShadowProgress, write_shadow_report
from edge.models.state import ConfiguredProduct, ModelStateFile, ProductState
from edge.models.store import PackageStore, RefusedError, TrustedKeys, read_trusted, refuse_announced
from edge.result import Inspected
from edge.status import RolloutStatus, ShadowStatus
from edgeflame.errors import EdgeFlameError, UsageError
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import CandidateModel, Disagreement, ProductModels, Release

log = EventLog("models")

MIN_LATENCIES = 20
"""Fewer parts say nothing about how long the present model takes."""


@final
class RolloutController:
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
        book: Rollouts,
        *,
        seats: Deployment,
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

    def _look_at_shadow(self, product: str, slot: RolloutSlot, release: Release) -> None:
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
        times = LatencyBudget(latency_ms=latency_ms, deadline_ms=self._deadline_ms)
        ruling = check_acceptance(found, needed=needed, config=self._config, times=times)
        if ruling is None:
            return
        self._book.stop_shadow(product)
        write_shadow_report(self._store.shadow_folder(sha256), found)
        if ruling.passed:
            self._passed(product, found)
        else:
            self._book.drop(product, "refused", ruling.reason, ruling.detail, found)

    def _passed(self, product: str, found: Disagreement | None) -> None:
        log.info("shadow_passed", product=product, share=None if found is None else found.share)
        if self._config.auto:
            self._book.switch(product, found)
        else:
            self._book.write(product, rollout_state.advance_candidate(self._book.entry(product), "waiting", found))

    def _look_at_trial(self, product: str, slot: RolloutSlot, entry: ProductState) -> None:
        assert entry.present is not None
        if self._config.trial_parts == 0:
            self._book.write(product, rollout_state.confirm_present(entry, utc_now(), None))
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
            self._book.write(product, rollout_state.confirm_present(entry, utc_now(), _of(progress)))
            self._book.stop_shadow(product)
            slot.before = None
            log.info("model_confirmed", product=product, sha256=entry.present_sha256[:12])

    def _start_trial(self, product: str, slot: RolloutSlot, entry: ProductState) -> None:
        self._book.stop_shadow(product)
        slot.trial = Canary(
            parts=self._config.trial_parts,
            accepted=self._config.max_disagreement,
            max_faults=self._config.max_faults,
        )
        before = entry.previous[0].sha256 if entry.previous else None
        file = Path(slot.configured.file) if before is None else self._store.path(before)
        slot.shadow = self._start_shadow(slot, file, None, slot.trial)
        log.info("trial_begun", product=product, sha256=entry.present_sha256[:12], parts=self._config.trial_parts)

    def _end_trial_badly(self, product: str, alarm: CanaryAlarm, progress: ShadowProgress | None) -> None:
        try:
            self._book.roll_back(product, "rolled_back", alarm.reason, alarm.detail, found=_of(progress))
        except EdgeFlameError as exc:
            # Nothing earlier can be opened; a model that proved bad is still better than none, and says so.
            log.error("roll_back_failed", product=product, reason=str(exc))
            self._book.stop_shadow(product)
            self._book.write(
                product, rollout_state.confirm_present(self._book.entry(product), utc_now(), _of(progress))
            )

    def _start_shadow(self, slot: RolloutSlot, file: Path, folder: Path | None, trial: Canary | None) -> Shadow:
        name, present = slot.configured.name, self._book.file(slot)
        return Shadow(lambda: self._seats.open_second(name, file, present), folder=folder, trial=trial, wake=self._wake)


def _of(progress: ShadowProgress | None) -> Disagreement | None:
    return None if progress is None else progress.disagreement


@final
class ModelManager:
    """All products of a line; :meth:`watch` is for any thread, everything else for one.

    Args:
        config: section ``[models]``.
        line: its name in the fleet.
        products: as the configuration has them.
        seats: where models judge.
        store: packages on disk.
        record: what was decided.
        keys: whose packages are taken.
        deadline_ms: of a part; None: there is none.
        wake: called, from any thread, when :meth:`look` has something to do.

    Raises:
        StorageError: what was decided cannot be written; here and in every method.
    """

    def __init__(
        self,
        config: ModelsConfig,
        *,
        line: str,
        products: Mapping[str, ConfiguredProduct],
        seats: Deployment,
        store: PackageStore,
        record: ModelStateFile,
        keys: TrustedKeys,
        deadline_ms: float | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._line = line
        self._store = store
        self._keys = keys
        self._wake = wake
        self._book = Rollouts(products, seats=seats, store=store, record=record, keep=config.keep)
        self._tryouts = RolloutController(
            config, self._book, seats=seats, store=store, deadline_ms=deadline_ms, wake=wake
        )

    def look(self) -> None:
        """See how shadow runs and trials stand, and act on it; called again and again."""
        self._tryouts.look()

    def find(self, name: str) -> str:
        """The product of a name in the configuration or in the fleet.

        Raises:
            UsageError: there is none.
        """
        return self._book.find(name)

    def offered(self, release: Release) -> bool:
        """An announcement came; whether its package is to be fetched now.

        Raises:
            StorageError: what was decided cannot be written; here and in every method.
        """
        product = release.product
        if product not in self._book.slots or (release.lines and self._line not in release.lines):
            return False
        entry = self._book.entry(product)
        if release.withdrawn:
            self._withdrawn(release)
            return False
        candidate = entry.candidate
        if candidate is not None and candidate.release.release == release.release:
            return candidate.stage == "fetching"
        if release.release in entry.decided:
            return False
        log.info("release_offered", product=product, sha256=release.manifest.sha256[:12], name=release.name)
        try:
            refuse_announced(release, keys=self._keys, max_bytes=self._config.max_bytes)
        except RefusedError as exc:
            # Whoever announces what nobody takes does not end what is being tried.
            log.error("release_refused", product=product, reason=exc.reason, detail=str(exc))
            entry = rollout_state.record_outcome(
                entry, release, "refused", utc_now(), reason=exc.reason, detail=str(exc)
            )
            self._book.write(product, entry)
            return False
        if candidate is not None:
            self._book.stop_shadow(product)
        entry = rollout_state.begin_candidate(entry, release, utc_now())
        self._book.write(product, entry)
        if release.manifest.sha256 == entry.present_sha256:
            self._book.write(
                product, rollout_state.drop_candidate(entry, "confirmed", utc_now(), detail="it runs already")
            )
            return False
        return True

    def wanted(self, product: str) -> Release | None:
        """What is still to be fetched for a product."""
        candidate = self._book.entry(product).candidate if product in self._book.slots else None
        return candidate.release if candidate is not None and candidate.stage == "fetching" else None

    def fetched(self, product: str) -> None:
        """The candidate's package is on the disk: check it, and begin to try it."""
        entry = self._book.entry(product)
        assert entry.candidate is not None
        slot, sha256 = self._book.slots[product], entry.candidate.release.manifest.sha256
        try:
            path = self._store.take(sha256)
            read_trusted(path, sha256=sha256, product=product, keys=self._keys)
            slot.judges = self._book.open(slot, path, sha256)
        except RefusedError as exc:
            self.refuse(product, exc.reason, str(exc))
            return
        log.info("package_checked", product=product, sha256=sha256[:12])
        if entry.candidate.stage == "fetching":
            self._book.write(product, rollout_state.advance_candidate(entry, "shadow"))
        self._tryouts.look()

    def refuse(self, product: str, reason: str, detail: str, found: Disagreement | None = None) -> None:
        """Drop the candidate."""
        self._book.drop(product, "refused", reason, detail, found)

    def switch(self, product: str) -> None:
        """Switch to a candidate that waits for that word.

        Raises:
            UsageError: there is none.
        """
        entry = self._book.known(product)
        if entry.candidate is None or entry.candidate.stage != "waiting":
            stage = "there is none" if entry.candidate is None else f"it is in the stage {entry.candidate.stage!r}"
            raise UsageError(f"{product}: no candidate waits to be switched to ({stage})")
        self._book.switch(product, entry.candidate.disagreement)

    def roll_back(self, product: str, *, reason: str = "command", detail: str = "", to_file: bool = False) -> None:
        """Go back to the model before, or to the configuration's file.

        Raises:
            UsageError: there is no such product, or its file is what runs.
            EdgeFlameError: nothing earlier can be opened.
        """
        entry = self._book.known(product)
        if entry.present is None:
            raise UsageError(f"{product}: the file of the configuration is what runs; there is nothing to roll back to")
        self._book.roll_back(product, "rolled_back", reason, detail or "by command", to_file=to_file)

    def on_part(self, captured: Captured, inspected: Inspected) -> None:
        """Every part, on its line's thread."""
        result = inspected.result
        if result.golden:
            # No part of the production, and judged apart from it.
            return
        slot = self._book.by_model.get(result.model)
        if slot is None:
            return
        slot.latencies.append(result.latency_ms)
        # Looked at once each: the other thread may end them meanwhile.
        trial, shadow = slot.trial, slot.shadow
        if trial is not None and trial.alarm is None and trial.judged(result) is not None:
            self._wake()
        if shadow is not None:
            shadow.offer(captured, inspected)

    def resume(self) -> None:
        """At the start: go on where the last process was; candidates on the disk are checked again."""
        for product in self._book.slots:
            candidate = self._book.entry(product).candidate
            if candidate is not None and candidate.stage != "fetching":
                self.fetched(product)
        self._tryouts.look()

    def models(
        self, progress: Mapping[str, tuple[int, int]], *, is_checking: str | None = None
    ) -> tuple[ProductModels, ...]:
        """What to tell the fleet.

        Args:
            progress: of transfers, by product.
            is_checking: the product whose candidate is about to be checked.
        """
        return tuple(
            self._models(product, slot, progress.get(product), is_checking=product == is_checking)
            for product, slot in self._book.slots.items()
        )

    def model_of(self, product: str) -> ProductModels:
        """One of :meth:`models`."""
        return self._models(product, self._book.slots[product], None, is_checking=False)

    def figures(self) -> RolloutStatus:
        """For metrics; for any thread."""
        beside = []
        for product, slot in self._book.slots.items():
            name, shadow = slot.configured.name, slot.shadow
            entry = self._book.entry(product)
            found = None if shadow is None else shadow.progress().disagreement
            beside.append(
                ShadowStatus(
                    product=name,
                    role="candidate" if slot.trial is None else "before",
                    on_trial=entry.on_trial,
                    found=found,
                )
            )
        return RolloutStatus(beside=tuple(beside), fates=dict(self._book.fates))

    def close(self) -> None:
        """End shadow runs; they begin anew after the next start."""
        for product in self._book.slots:
            self._book.stop_shadow(product)

    def _withdrawn(self, release: Release) -> None:
        product = release.product
        entry = self._book.entry(product)
        if entry.candidate is not None and entry.candidate.release.release == release.release:
            self._book.drop(product, "withdrawn", None, "")
        elif entry.present is not None and entry.present.release == release.release:
            try:
                self._book.roll_back(product, "withdrawn", "withdrawn", "by its publisher")
            except EdgeFlameError as exc:
                log.error("roll_back_failed", product=product, reason=str(exc))
        elif release.release not in entry.decided:
            self._book.write(product, rollout_state.record_outcome(entry, release, "withdrawn", utc_now()))

    def _models(
        self, product: str, slot: RolloutSlot, transfer: tuple[int, int] | None, *, is_checking: bool
    ) -> ProductModels:
        entry = self._book.entry(product)
        candidate = None
        if entry.candidate is not None:
            release, stage = entry.candidate.release, entry.candidate.stage
            found, done, total = entry.candidate.disagreement, 0, 0
            if stage == "shadow":
                total = max(self._config.shadow_parts, release.shadow_parts)
                if slot.shadow is not None and slot.trial is None:
                    found = slot.shadow.progress().disagreement
                    done = min(found.parts, total)
            elif is_checking:
                stage = "checking"
            elif stage == "fetching":
                done, total = transfer or (0, release.manifest.num_chunks)
            candidate = CandidateModel(
                release=release.release,
                sha256=release.manifest.sha256,
                name=release.name,
                stage=stage,
                done=done,
                total=total,
                disagreement=found,
            )
        return ProductModels(
            product=product,
            present=entry.running(),
            previous=entry.earlier(),
            candidate=candidate,
            outcomes=entry.outcomes,
        )
