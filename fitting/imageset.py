"""The images of one site: read once, kept as uint8 within a memory budget, otherwise read again when needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgeflame.dataset import ImageRecord, LoadReport, UnreadablePolicy, load_images
from edgeflame.image_quality import MIN_COLOUR, ColourCheck
from edgeflame.images import ImageU8, Preprocessing
from edgeflame.log import Progress, no_progress
from edgeflame.package import DEFAULT_REFERENCES, evenly_spaced

MAX_CACHE_BYTES = 1 << 30
"""Pre-processed images kept in memory: 5461 of 256 x 256. The rest is read from disk each time."""


class ImageSet:
    """Pre-processed images by index.

    Attributes:
        records: the readable ones; an index means the same image everywhere.
        report: what happened while they were read.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        preprocessing: Preprocessing,
        *,
        on_unreadable: UnreadablePolicy = "skip",
        max_cache_bytes: int = MAX_CACHE_BYTES,
        progress: Progress = no_progress,
    ) -> None:
        """Read every image once, so that what cannot be read is known before any work starts.

        Raises:
            DataError: an image is unreadable and ``on_unreadable`` is ``refuse``.
        """
        self.preprocessing = preprocessing
        self.report = LoadReport()
        readable: list[ImageRecord] = []
        self._cache: dict[int, ImageU8] = {}
        room = max_cache_bytes // (preprocessing.height * preprocessing.width * 3)
        for record, image in load_images(records, preprocessing, on_unreadable=on_unreadable, report=self.report):
            if len(self._cache) < room:
                self._cache[len(readable)] = image
            readable.append(record)
            progress(self.report.num_read + len(self.report.unreadable), len(records))
        self.records = tuple(readable)
        self._check_colours()
        self.report.log_summary()

    def _check_colours(self) -> None:
        """Note images whose colours a line would not judge; those that are not in memory are not read again for it."""
        fit = {
            index: image for index, image in self._cache.items() if self.records[index].name not in self.report.unfit
        }
        chosen = evenly_spaced(len(fit), DEFAULT_REFERENCES)
        check = ColourCheck([list(fit.values())[index] for index in chosen], MIN_COLOUR)
        for index, image in fit.items():
            if faults := check.faults(image):
                self.report.unfit[self.records[index].name] = faults

    def __len__(self) -> int:
        return len(self.records)

    @property
    def groups(self) -> list[str]:
        """The part that each image shows."""
        return [record.group for record in self.records]

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """Some of the images, in the given order, sharing what is in memory; the report stays that of all."""
        part = copy.copy(self)
        part.records = tuple(self.records[index] for index in indices)
        held = {new: self._cache[old] for new, old in enumerate(indices) if old in self._cache}
        part._cache = held  # noqa: SLF001 - of this very class
        return part

    def with_groups(self, groups: Sequence[str]) -> ImageSet:
        """The same images, as photographs of these parts."""
        regrouped = self.subset(range(len(self)))
        regrouped.records = tuple(
            replace(record, group=group) for record, group in zip(self.records, groups, strict=True)
        )
        return regrouped

    def batch(self, indices: Sequence[int]) -> ImageU8:
        """Images ``[N, height, width, 3]`` uint8, BGR."""
        return np.stack([self._image(index) for index in indices])

    def _image(self, index: int) -> ImageU8:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        record = self.records[index]
        preprocessing = self.preprocessing.without_roi() if record.is_cropped else self.preprocessing
        return preprocessing.apply(preprocessing.read(record.path))
