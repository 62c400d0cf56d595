"""What a product is learnt from beside its photographs: a base network, a prior, what people marked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import final

from edge.cameras import Cameras
from edge.teaching.orders import MarkedParts, TeachingOrder
from edge.teaching.record import TeachingRecord, TeachingStore
from edgeflame.errors import DataError, StorageError, UsageError
from edgeflame.log import EventLog
from edgeflame.marks import MarkStore
from edgeflame.package import read_package

log = EventLog("teaching")


@dataclass(frozen=True, kw_only=True)
class LearningBasis:
    """What is learnt from beside the photographs.

    Attributes:
        base: package or file with the base network; None: PyTorch makes it. With ``marks`` the present package, which
            the candidate is compared with.
        marks: folder of marks; None: none are learnt from.
        prior: the package whose statistics are leant on; it gives the base network, too. None: there is none.
        prior_product: its product.
    """

    base: Path | None = None
    marks: Path | None = None
    prior: Path | None = None
    prior_product: str | None = None


class MarkCounter(Counter[tuple[str, str]]):
    """How many marks there are, by product (empty: not known) and by what the part was."""

    def of(self, product: str) -> MarkedParts:
        """Those that a product can be learnt from."""
        good, bad = (self[product, was] + self["", was] for was in ("good", "bad"))
        return MarkedParts(good=good, bad=bad)


@final
class BasisChooser:
    """Chooses what a product is learnt from.

    Args:
        store: the records.
        cameras: the daemon's, whose products' packages can be used.
        marks: what people said parts really were.
        base: ``teaching.base``.
        torch: whether PyTorch could make a base network.
    """

    def __init__(
        self, store: TeachingStore, cameras: Cameras, marks: MarkStore, base: str | None, *, torch: bool
    ) -> None:
        self._store = store
        self._cameras = cameras
        self._marks = marks
        self._base = base
        self._torch = torch

    def choose(self, record: TeachingRecord, order: TeachingOrder, *, present: str) -> LearningBasis:
        """What an order asks for.

        Args:
            record: the product's.
            order: ``learn``.
            present: the product that its camera inspects.

        Raises:
            UsageError: there is nothing marked, nothing learnt before, or no such product to lean on.
            DataError: there is no base network.
        """
        learnt = record.learnt
        prior = order.prior
        if order.marks and prior is None and learnt is not None:
            prior = learnt.prior
        leant_on = None if prior is None else self._package_of(record, prior)
        if not order.marks:
            return LearningBasis(
                base=None if leant_on is not None else self._base_network(present), prior=leant_on, prior_product=prior
            )
        return LearningBasis(base=self._compared(record), marks=self._marks.folder, prior=leant_on, prior_product=prior)

    def priors(self, product: str) -> tuple[str, ...]:
        """Products of this line, other than this one, whose models can be leant on."""
        return tuple(sorted(name for name in self._packages() if name != product))

    def marked(self) -> MarkCounter:
        """How many marks there are; none where they cannot be read."""
        try:
            return MarkCounter((mark.product, mark.was) for mark in self._marks.marks())
        except StorageError as exc:
            log.error("marks_unreadable", reason=str(exc))
            return MarkCounter()

    def _package_of(self, record: TeachingRecord, product: str) -> Path:
        known = self.priors(record.product)
        if product not in known:
            raise UsageError(f"{product[:80]}: no other product of this line; there are: {', '.join(known) or 'none'}")
        return self._packages()[product]

    def _packages(self) -> dict[str, Path]:
        """Those of the line's products that are there."""
        return {name: file for name, file in self._cameras.products.items() if file.is_file()}

    def _compared(self, record: TeachingRecord) -> Path:
        """The model that one learnt from marks is compared with: the one that is live, or the last learnt."""
        product, folder = record.product, self._store.path(record.product)
        if self.marked().of(product) == MarkedParts():
            raise UsageError(f"{product}: no part is marked as good or bad yet")
        if record.live:
            package = folder / record.live[0].file
        elif record.learnt is not None:
            package = folder / record.learnt.file
        else:
            raise UsageError(f"{product}: nothing has been learnt yet; learn from the photographs alone first")
        roi = read_package(package).manifest.learning.input.roi
        if record.region != (None if roi is None else (roi.x, roi.y, roi.width, roi.height)):
            raise UsageError(
                f"{product}: the region has changed since the model was learnt; learn from the photographs alone "
                "first, and have that go live"
            )
        return package

    def _base_network(self, present: str) -> Path | None:
        """Package or file with the base network; None: PyTorch makes it."""
        if self._base is not None:
            base = Path(self._base)
            if not base.is_file():
                raise DataError(f"teaching.base: no such file: {base}")
            return base
        files = self._packages()
        found = files.get(present) or next(iter(files.values()), None)
        if found is None and not self._torch:
            raise DataError(
                "there is no base network here: the line has no package yet, and PyTorch is not installed. Name any "
                'package, or a file of `edgeflame export --backbone`, in the configuration: [teaching] base = "FILE"'
            )
        return found
