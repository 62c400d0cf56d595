"""The model manager decides about a line's models: on announced releases, on commands, and on the parts' results.

It starts and polls shadow runs before a switch and canary phases after it, and acts on their outcome. The decisions are
carried out by :mod:`edge.models.rollout`. One thread, that of the release fetcher, calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import numpy as np

from edge.config.outputs import ModelsConfig
from edge.frame import Captured
from edge.models.rollout import Deployment, LatencyBudget, Rollouts, RolloutSlot, check_acceptance, utc_now
from edge.models.shadow import Canary, CanaryAlarm, Shadow, ShadowProgress, write_shadow_report
from edge.models.state import (
    ConfiguredProduct,
    ModelStateFile,
    ProductState,
    advance_candidate,
    begin_candidate,
    confirm_present,
    drop_candidate,
    reconsider_release,
    record_outcome,
)
from edge.models.store import PackageStore, RefusedError, TrustedKeys, read_trusted, refuse_announced
from edge.result import Inspected
from edge.status import RolloutStatus, ShadowStatus
from edgeflame.errors import EdgeFlameError, UsageError
from edgeflame.log import EventLog
from edgeflame.mqtt.release_messages import CandidateModel, Disagreement, ProductModels, Release

log = EventLog("models")

MIN_LATENCIES = 20
"""Number of parts needed for the quantile of the present model's latency."""

_DIED = (
    "the line's process ended while it checked this package (killed for its memory, or the power failed), and would "
    "perhaps end again; to have it tried once more: edgeflame model publish --again"
)


@final
class ModelManager:
    """Decides about the models of all products of a line. Not thread-safe, but for :meth:`on_part` and :meth:`metrics`.

    Args:
        config: section ``[models]``.
        line: the line's name in the fleet.
        products: the configuration's products by their names in the fleet.
        deployment: puts models on the cameras.
        store: the packages on the disk.
        state_file: the decisions.
        keys: the trusted keys.
        deadline_ms: deadline of a part; None: there is none.
        wake: called, on any thread, when :meth:`poll` has something to do.

    Raises:
        StorageError: a decision cannot be written; so in every method that decides.
    """

    def __init__(
        self,
        config: ModelsConfig,
        *,
        line: str,
        products: Mapping[str, ConfiguredProduct],
        deployment: Deployment,
        store: PackageStore,
        state_file: ModelStateFile,
        keys: TrustedKeys,
        deadline_ms: float | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._line = line
        self._store = store
        self._keys = keys
        self._wake = wake
        self._deployment = deployment
        self._deadline_ms = deadline_ms
        self._older: dict[str, Release] = {}
        """By product, the release that was last refused for its number."""
        self._allowed: set[str] = set()
        """Releases that a person wants whatever their number."""
        self._rollouts = Rollouts(products, deployment=deployment, store=store, state_file=state_file, keep=config.keep)

    def poll(self) -> None:
        """Check shadow runs and canary phases, and act on them; to be called regularly."""
        for product, slot in self._rollouts.slots.items():
            entry = self._rollouts.state_of(product)
            candidate = entry.candidate
            if candidate is not None and candidate.stage == "shadow" and slot.inspectors is not None:
                self._poll_shadow(product, slot, candidate.release)
            elif entry.on_trial and entry.present is not None:
                self._poll_canary(product, slot, entry)
            self._rollouts.fix_stray_cameras(product, slot)

    def find(self, name: str) -> str:
        """A product's name in the fleet, found by that name or by the one in the configuration.

        Raises:
            UsageError: there is no such product.
        """
        return self._rollouts.find(name)

    def on_release(self, release: Release) -> bool:
        """Handle an announced release; returns whether its package is to be fetched now."""
        product = release.product
        if product not in self._rollouts.slots or (release.lines and self._line not in release.lines):
            return False
        entry = self._rollouts.state_of(product)
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
            # A refused announcement does not end the trial of another candidate.
            log.error("release_refused", product=product, reason=exc.reason, detail=str(exc))
            entry = record_outcome(entry, release, "refused", utc_now(), reason=exc.reason, detail=str(exc))
            self._rollouts.save(product, entry)
            return False
        if candidate is not None:
            self._rollouts.stop_shadow(product)
        entry = begin_candidate(entry, release, utc_now())
        self._rollouts.save(product, entry)
        if release.manifest.sha256 == entry.present_sha256:
            self._rollouts.save(product, drop_candidate(entry, "confirmed", utc_now(), detail="it runs already"))
            return False
        return True

    def pending_release(self, product: str) -> Release | None:
        """The release that is still to be fetched for a product; None if there is none."""
        candidate = self._rollouts.state_of(product).candidate if product in self._rollouts.slots else None
        return candidate.release if candidate is not None and candidate.stage == "fetching" else None

    def on_package(self, product: str) -> None:
        """Check the candidate's package, which is on the disk now, and start its shadow run."""
        entry = self._rollouts.state_of(product)
        assert entry.candidate is not None
        release = entry.candidate.release
        slot, sha256 = self._rollouts.slots[product], release.manifest.sha256
        if self._store.died_checking(release.release):
            self.reject(product, "died", _DIED)
            self._store.forget_check()
            return
        try:
            with self._store.checking(release.release):
                path = self._store.adopt(sha256)
                highest = self._store.release_number(product)
                least = slot.configured.release_number if highest is None else highest
                is_allowed = release.release in self._allowed
                number = read_trusted(
                    path, sha256=sha256, product=product, keys=self._keys, least=0 if is_allowed else least
                )
                self._store.keep_release_number(product, number)
                slot.inspectors = self._rollouts.open(slot, path, sha256)
        except RefusedError as exc:
            if exc.reason == "older":
                self._older[product] = release
            self.reject(product, exc.reason, str(exc))
            return
        log.info("package_checked", product=product, sha256=sha256[:12])
        if entry.candidate.stage == "fetching":
            self._rollouts.save(product, advance_candidate(entry, "shadow"))
        self.poll()

    def reject(self, product: str, reason: str, detail: str, found: Disagreement | None = None) -> None:
        """Refuse the candidate."""
        self._rollouts.drop(product, "refused", reason, detail, found)

    def promote(self, product: str) -> None:
        """Switch to the candidate that waits for a person's decision.

        Raises:
            UsageError: there is none.
        """
        entry = self._rollouts.known(product)
        if entry.candidate is None or entry.candidate.stage != "waiting":
            stage = "there is none" if entry.candidate is None else f"it is in the stage {entry.candidate.stage!r}"
            raise UsageError(f"{product}: no candidate waits to be switched to ({stage})")
        self._rollouts.promote(product, entry.candidate.disagreement)

    def allow_older(self, product: str) -> Release:
        """Take up the release again that was refused for its number; returns it, to be fetched.

        Raises:
            UsageError: no release was refused for that since the start.
        """
        release = self._older.pop(product, None)
        if release is None:
            raise UsageError(
                f"{product}: no release was refused as older since the line's start; publish it again "
                "(edgeflame model publish --again), and allow it then"
            )
        self._allowed.add(release.release)
        self._rollouts.save(product, reconsider_release(self._rollouts.state_of(product), release))
        log.warning("older_release_allowed", product=product, release=release.release[:8], name=release.name)
        return release

    def roll_back(self, product: str, *, reason: str = "command", detail: str = "", to_file: bool = False) -> None:
        """Go back to the model before, or to the configuration's file.

        Raises:
            UsageError: there is no such product, or its file is what runs.
            EdgeFlameError: nothing earlier can be opened.
        """
        entry = self._rollouts.known(product)
        if entry.present is None:
            raise UsageError(f"{product}: the file of the configuration is what runs; there is nothing to roll back to")
        self._rollouts.roll_back(product, "rolled_back", reason, detail or "by command", to_file=to_file)

    def on_part(self, captured: Captured, inspected: Inspected) -> None:
        """Take a part, on the thread of its camera worker."""
        result = inspected.result
        if result.golden:
            # Golden parts are not production.
            return
        slot = self._rollouts.by_model.get(result.model)
        if slot is None:
            return
        slot.latencies.append(result.latency_ms)
        # Read once each: the other thread may end them meanwhile.
        canary, shadow = slot.canary, slot.shadow
        if canary is not None and canary.alarm is None and canary.on_result(result) is not None:
            self._wake()
        if shadow is not None:
            shadow.offer(captured, inspected)

    def restore(self) -> None:
        """At the start: continue where the last process ended; candidates on the disk are checked again."""
        for product in self._rollouts.slots:
            candidate = self._rollouts.state_of(product).candidate
            if candidate is not None and candidate.stage != "fetching":
                self.on_package(product)
        self.poll()

    def statuses(
        self, progress: Mapping[str, tuple[int, int]], *, is_checking: str | None = None
    ) -> tuple[ProductModels, ...]:
        """The models of all products, to be published to the fleet.

        Args:
            progress: chunks fetched and their total, of transfers under way, by product.
            is_checking: the product whose candidate is about to be checked; None: none is.
        """
        return tuple(
            self._status(product, slot, progress.get(product), is_checking=product == is_checking)
            for product, slot in self._rollouts.slots.items()
        )

    def status_of(self, product: str) -> ProductModels:
        """One of :meth:`statuses`."""
        return self._status(product, self._rollouts.slots[product], None, is_checking=False)

    def metrics(self) -> RolloutStatus:
        """The figures for metrics; any thread may call it."""
        beside = []
        for product, slot in self._rollouts.slots.items():
            name, shadow = slot.configured.name, slot.shadow
            entry = self._rollouts.state_of(product)
            found = None if shadow is None else shadow.progress().disagreement
            beside.append(
                ShadowStatus(
                    product=name,
                    role="candidate" if slot.canary is None else "before",
                    on_trial=entry.on_trial,
                    found=found,
                )
            )
        return RolloutStatus(beside=tuple(beside), fates=dict(self._rollouts.outcomes))

    def close(self) -> None:
        """End shadow runs; they start again after the next start of the daemon."""
        for product in self._rollouts.slots:
            self._rollouts.stop_shadow(product)

    def _poll_shadow(self, product: str, slot: RolloutSlot, release: Release) -> None:
        needed = max(self._config.shadow_parts, release.shadow_parts)
        sha256 = release.manifest.sha256
        if needed == 0:
            self._accept(product, None)
            return
        if slot.shadow is None or slot.canary is not None:
            self._rollouts.stop_shadow(product)
            slot.shadow = self._start_shadow(slot, self._store.path(sha256), self._store.shadow_folder(sha256), None)
            log.info("shadow_begun", product=product, sha256=sha256[:12], parts=needed)
        progress = slot.shadow.progress()
        found = progress.disagreement
        if progress.problem is not None:
            self._rollouts.drop(product, "refused", "not_opened", progress.problem, found)
            return
        # Copied first: camera workers go on adding to it.
        latencies = list(slot.latencies)
        latency_ms = float(np.quantile(latencies, 0.95)) if len(latencies) >= MIN_LATENCIES else None
        times = LatencyBudget(latency_ms=latency_ms, deadline_ms=self._deadline_ms)
        ruling = check_acceptance(found, needed=needed, config=self._config, times=times)
        if ruling is None:
            return
        self._rollouts.stop_shadow(product)
        write_shadow_report(self._store.shadow_folder(sha256), found)
        if ruling.passed:
            self._accept(product, found)
        else:
            self._rollouts.drop(product, "refused", ruling.reason, ruling.detail, found)

    def _accept(self, product: str, found: Disagreement | None) -> None:
        log.info("shadow_passed", product=product, share=None if found is None else found.share)
        if self._config.auto_promote:
            self._rollouts.promote(product, found)
        else:
            self._rollouts.save(product, advance_candidate(self._rollouts.state_of(product), "waiting", found))

    def _poll_canary(self, product: str, slot: RolloutSlot, entry: ProductState) -> None:
        assert entry.present is not None
        if self._config.trial_parts == 0:
            self._rollouts.save(product, confirm_present(entry, utc_now(), None))
            return
        if slot.canary is None:
            self._start_canary(product, slot, entry)
            return
        progress = None if slot.shadow is None else slot.shadow.progress()
        alarm = slot.canary.alarm
        if alarm is not None:
            log.error("trial_failed", product=product, reason=alarm.reason, detail=alarm.detail)
            self._end_canary_badly(product, alarm, progress)
        elif slot.canary.is_over or (progress is not None and progress.problem is not None):
            if progress is not None and progress.problem is not None:
                # The model before cannot be run beside the present one; there is nothing to compare with.
                log.warning("trial_cut_short", product=product, reason=progress.problem)
            self._rollouts.save(product, confirm_present(entry, utc_now(), _of(progress)))
            self._rollouts.stop_shadow(product)
            slot.before = None
            log.info("model_confirmed", product=product, sha256=entry.present_sha256[:12])

    def _start_canary(self, product: str, slot: RolloutSlot, entry: ProductState) -> None:
        self._rollouts.stop_shadow(product)
        slot.canary = Canary(
            parts=self._config.trial_parts,
            accepted=self._config.max_disagreement,
            max_faults=self._config.max_faults,
        )
        before = entry.previous[0].sha256 if entry.previous else None
        file = Path(slot.configured.file) if before is None else self._store.path(before)
        slot.shadow = self._start_shadow(slot, file, None, slot.canary)
        log.info("trial_begun", product=product, sha256=entry.present_sha256[:12], parts=self._config.trial_parts)

    def _end_canary_badly(self, product: str, alarm: CanaryAlarm, progress: ShadowProgress | None) -> None:
        try:
            self._rollouts.roll_back(product, "rolled_back", alarm.reason, alarm.detail, found=_of(progress))
        except EdgeFlameError as exc:
            # Nothing earlier can be opened; a model that proved bad is still better than none.
            log.error("roll_back_failed", product=product, reason=str(exc))
            self._rollouts.stop_shadow(product)
            self._rollouts.save(product, confirm_present(self._rollouts.state_of(product), utc_now(), _of(progress)))

    def _start_shadow(self, slot: RolloutSlot, file: Path, folder: Path | None, canary: Canary | None) -> Shadow:
        name, present = slot.configured.name, self._rollouts.file(slot)
        return Shadow(
            lambda: self._deployment.open_shadow(name, file, present), folder=folder, canary=canary, wake=self._wake
        )

    def _withdrawn(self, release: Release) -> None:
        product = release.product
        entry = self._rollouts.state_of(product)
        if entry.candidate is not None and entry.candidate.release.release == release.release:
            self._rollouts.drop(product, "withdrawn", None, "")
        elif entry.present is not None and entry.present.release == release.release:
            try:
                self._rollouts.roll_back(product, "withdrawn", "withdrawn", "by its publisher")
            except EdgeFlameError as exc:
                log.error("roll_back_failed", product=product, reason=str(exc))
        elif release.release not in entry.decided:
            self._rollouts.save(product, record_outcome(entry, release, "withdrawn", utc_now()))

    def _status(
        self, product: str, slot: RolloutSlot, transfer: tuple[int, int] | None, *, is_checking: bool
    ) -> ProductModels:
        entry = self._rollouts.state_of(product)
        candidate = None
        if entry.candidate is not None:
            release, stage = entry.candidate.release, entry.candidate.stage
            found, done, total = entry.candidate.disagreement, 0, 0
            if stage == "shadow":
                total = max(self._config.shadow_parts, release.shadow_parts)
                if slot.shadow is not None and slot.canary is None:
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


def _of(progress: ShadowProgress | None) -> Disagreement | None:
    return None if progress is None else progress.disagreement
