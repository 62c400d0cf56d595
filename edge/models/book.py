"""What is decided about each product, and how a decision is carried out.

Order of every change: the new judges are opened and checked, then the record is written, then the line uses them. A
crash before the record leaves the old model, after it the new one; there is nothing between.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import final

from edge.judge import Judge
from edge.models import record as records
from edge.models.check import RefusedError, refusal
from edge.models.record import ProductRecord, RecordFile
from edge.models.seats import Configured, Seats
from edge.models.shadow import Shadow
from edge.models.store import PackageStore
from edge.models.trial import Trial
from edgeflame.console import EventLog
from edgeflame.errors import EdgeFlameError, UsageError
from edgeflame.releases.messages import Disagreement, Fate

log = EventLog("models")

LATENCIES = 500


def utc_now() -> datetime:
    """The time."""
    return datetime.now(timezone.utc)


class Slot:
    """What of a product is in memory."""

    def __init__(self, configured: Configured) -> None:
        self.configured = configured
        self.shadow: Shadow | None = None
        self.trial: Trial | None = None
        self.judges: Mapping[str, Judge] | None = None
        """Of the candidate, ready to be used."""
        self.before: tuple[str, Mapping[str, Judge]] | None = None
        """Hash and judges of the model before, while the present one is on trial."""
        self.latencies: collections.deque[float] = collections.deque(maxlen=LATENCIES)


@final
class Book:
    """All products of a line; one thread uses it.

    Args:
        products: as the configuration has them.
        seats: where models judge.
        store: packages on disk.
        record: what was decided.
        keep: released models kept to roll back to.
        clock: wall time, UTC.

    Raises:
        StorageError: what is decided cannot be written; here and in every method that decides.
    """

    def __init__(
        self,
        products: Mapping[str, Configured],
        *,
        seats: Seats,
        store: PackageStore,
        record: RecordFile,
        keep: int,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.slots = {product: Slot(configured) for product, configured in products.items()}
        self.by_model: Mapping[str, Slot] = {}
        """Slots by the first 12 digits of what runs in them; replaced whole, for other threads to read."""
        self.fates: collections.Counter[tuple[str, str]] = collections.Counter()
        """What became of releases since the start, by the configuration's product and fate."""
        self._seats = seats
        self._store = store
        self._record = record
        self._keep = keep
        self._clock = clock
        self._index()
        self.tidy()

    def entry(self, product: str) -> ProductRecord:
        """What was decided about a product."""
        known = self._record.record.products.get(product)
        return known or ProductRecord(configured=self.slots[product].configured.sha256)

    def known(self, product: str) -> ProductRecord:
        """The same, by any name; raises as :meth:`find`."""
        return self.entry(self.find(product))

    def find(self, name: str) -> str:
        """The product of a name in the configuration or in the fleet.

        Raises:
            UsageError: there is none.
        """
        for product, slot in self.slots.items():
            if name in (product, slot.configured.name):
                return product
        msg = f"no product {name!r}; there are {', '.join(self.slots)}"
        raise UsageError(msg)

    def write(self, product: str, entry: ProductRecord) -> None:
        """Decide something, durably."""
        before = self.entry(product)
        self._record.write(product, entry)
        if entry.outcomes[:1] != before.outcomes[:1]:
            self.fates[self.slots[product].configured.name, entry.outcomes[0].fate] += 1
        self._index()

    def _index(self) -> None:
        self.by_model = {self.entry(product).present_sha256[:12]: slot for product, slot in self.slots.items()}

    def _path_of(self, slot: Slot, entry: ProductRecord) -> Path:
        return Path(slot.configured.file) if entry.present is None else self._store.path(entry.present.sha256)

    def file(self, slot: Slot) -> Path:
        """The present model's package."""
        return self._path_of(slot, self.entry(slot.configured.product))

    def open(self, slot: Slot, path: Path, sha256: str) -> Mapping[str, Judge]:
        """Judges of a package, checked and warm.

        Raises:
            RefusedError: it may not judge here.
        """
        try:
            return self._seats.open(slot.configured.name, path, sha256)
        except EdgeFlameError as exc:
            raise refusal(exc) from exc

    def _use(self, slot: Slot, path: Path, judges: Mapping[str, Judge]) -> Mapping[str, Judge]:
        try:
            return self._seats.use(slot.configured.name, path, judges)
        except EdgeFlameError as exc:
            # A part in hand that does not come to an end; the next look tries again.
            log.error("model_not_in_use_yet", product=slot.configured.product, reason=str(exc))
            return {}

    def stop_shadow(self, product: str) -> None:
        """End a shadow run or trial; what it has found is gone."""
        slot = self.slots[product]
        if slot.shadow is not None:
            slot.shadow.close()
        slot.shadow = slot.trial = None

    def drop(
        self, product: str, fate: Fate, reason: str | None, detail: str, found: Disagreement | None = None
    ) -> None:
        """The candidate will not run."""
        entry = self.entry(product)
        assert entry.candidate is not None
        release = entry.candidate.release
        if entry.candidate.stage == "shadow":
            self.stop_shadow(product)
        self.slots[product].judges = None
        self.write(product, records.drop(entry, fate, self._clock(), reason=reason, detail=detail, disagreement=found))
        log.error(
            "release_dropped",
            product=product,
            sha256=release.manifest.sha256[:12],
            fate=fate,
            reason=reason,
            detail=detail,
        )
        self._store.forget_partial(release.manifest.sha256)
        self.tidy()

    def switch(self, product: str, found: Disagreement | None) -> None:
        """The candidate is the present model from the next part on."""
        entry, slot = self.entry(product), self.slots[product]
        assert entry.candidate is not None
        sha256 = entry.candidate.release.manifest.sha256
        before = entry.present_sha256
        path = self._store.path(sha256)
        self.stop_shadow(product)
        try:
            judges = slot.judges or self.open(slot, path, sha256)
        except RefusedError as exc:
            self.drop(product, "refused", exc.reason, str(exc), found)
            return
        slot.judges = None
        entry = records.switch(entry, self._clock(), keep=self._keep, disagreement=found)
        self.write(product, entry)
        slot.latencies.clear()
        slot.before = (before, self._use(slot, path, judges))
        log.warning("model_released", product=product, before=before[:12], now=sha256[:12])
        self.tidy()

    def roll_back(
        self,
        product: str,
        fate: Fate,
        reason: str,
        detail: str,
        *,
        to_file: bool = False,
        found: Disagreement | None = None,
    ) -> None:
        """The model before is the present one from the next part on.

        Raises:
            RefusedError: neither it nor any before it can be opened; the present one stays.
        """
        entry, slot = self.entry(product), self.slots[product]
        bad, failure = entry.present_sha256, None
        while True:
            entry = records.roll_back(
                entry, self._clock(), fate=fate, reason=reason, detail=detail, to_file=to_file, disagreement=found
            )
            path = self._path_of(slot, entry)
            if slot.before is not None and slot.before[0] == entry.present_sha256:
                # Still warm: not a part more than need be is judged by a bad model.
                judges = slot.before[1]
                break
            try:
                judges = self.open(slot, path, entry.present_sha256)
                break
            except RefusedError as exc:
                failure = failure or exc
                log.error("earlier_model_refused", product=product, sha256=entry.present_sha256[:12], reason=str(exc))
                if entry.present is None:
                    raise failure from exc
                reason, detail, found = exc.reason, str(exc), None
        self.stop_shadow(product)
        self.write(product, entry)
        slot.latencies.clear()
        self._use(slot, path, judges)
        slot.before = None
        log.warning("model_rolled_back", product=product, before=bad[:12], now=entry.present_sha256[:12], reason=reason)
        self.tidy()

    def call_back_strays(self, product: str, slot: Slot) -> None:
        """A camera that was switched to the product just while its model changed has loaded the old one."""
        name, sha256 = slot.configured.name, self.entry(product).present_sha256
        if not self._seats.strays(name, sha256):
            return
        try:
            self._use(slot, self.file(slot), self.open(slot, self.file(slot), sha256))
        except EdgeFlameError as exc:
            log.error("camera_has_another_model", product=product, expected=sha256[:12], reason=str(exc))

    def tidy(self) -> None:
        """Delete packages and reports that nothing refers to any more."""
        keep: set[str] = set()
        reports: set[str] = set()
        for product in self.slots:
            entry = self.entry(product)
            keep |= entry.needed
            reports |= {outcome.sha256 for outcome in entry.outcomes}
            if entry.candidate is not None:
                keep.add(entry.candidate.release.manifest.sha256)
                reports.add(entry.candidate.release.manifest.sha256)
        self._store.prune(keep, reports)
