"""Decides about a line's models: what the fleet, people and parts say of them comes in here. One thread calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

from edge.capture import Captured
from edge.models import record as records
from edge.models.book import Book, Slot, utc_now
from edge.models.check import RefusedError, TrustedKeys, read_trusted, refuse_unseen
from edge.models.config import ModelsConfig
from edge.models.figures import Beside, Figures
from edge.models.record import RecordFile
from edge.models.seats import Configured, Seats
from edge.models.store import PackageStore
from edge.models.tryouts import Tryouts
from edge.results import Inspected
from edgeflame.console import EventLog
from edgeflame.errors import EdgeFlameError, UsageError
from edgeflame.releases.messages import Candidate, Disagreement, ProductModels, Release

log = EventLog("models")


@final
class Keeper:
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
        products: Mapping[str, Configured],
        seats: Seats,
        store: PackageStore,
        record: RecordFile,
        keys: TrustedKeys,
        deadline_ms: float | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._line = line
        self._store = store
        self._keys = keys
        self._wake = wake
        self._book = Book(products, seats=seats, store=store, record=record, keep=config.keep)
        self._tryouts = Tryouts(config, self._book, seats=seats, store=store, deadline_ms=deadline_ms, wake=wake)

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
            refuse_unseen(release, keys=self._keys, max_bytes=self._config.max_bytes)
        except RefusedError as exc:
            # Whoever announces what nobody takes does not end what is being tried.
            log.error("release_refused", product=product, reason=exc.reason, detail=str(exc))
            entry = records.decide(entry, release, "refused", utc_now(), reason=exc.reason, detail=str(exc))
            self._book.write(product, entry)
            return False
        if candidate is not None:
            self._book.stop_shadow(product)
        entry = records.begin(entry, release, utc_now())
        self._book.write(product, entry)
        if release.manifest.sha256 == entry.present_sha256:
            self._book.write(product, records.drop(entry, "confirmed", utc_now(), detail="it runs already"))
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
            self._book.write(product, records.advance(entry, "shadow"))
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
            msg = f"{product}: no candidate waits to be switched to ({stage})"
            raise UsageError(msg)
        self._book.switch(product, entry.candidate.disagreement)

    def roll_back(self, product: str, *, reason: str = "command", detail: str = "", to_file: bool = False) -> None:
        """Go back to the model before, or to the configuration's file.

        Raises:
            UsageError: there is no such product, or its file is what runs.
            EdgeFlameError: nothing earlier can be opened.
        """
        entry = self._book.known(product)
        if entry.present is None:
            msg = f"{product}: the file of the configuration is what runs; there is nothing to roll back to"
            raise UsageError(msg)
        self._book.roll_back(product, "rolled_back", reason, detail or "by command", to_file=to_file)

    def watch(self, captured: Captured, inspected: Inspected) -> None:
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

    def figures(self) -> Figures:
        """For metrics; for any thread."""
        beside = []
        for product, slot in self._book.slots.items():
            name, shadow = slot.configured.name, slot.shadow
            entry = self._book.entry(product)
            found = None if shadow is None else shadow.progress().disagreement
            beside.append(
                Beside(
                    product=name,
                    role="candidate" if slot.trial is None else "before",
                    on_trial=entry.on_trial,
                    found=found,
                )
            )
        return Figures(beside=tuple(beside), fates=dict(self._book.fates))

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
            self._book.write(product, records.decide(entry, release, "withdrawn", utc_now()))

    def _models(
        self, product: str, slot: Slot, transfer: tuple[int, int] | None, *, is_checking: bool
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
            candidate = Candidate(
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
