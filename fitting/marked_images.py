"""Marks as images to learn from: which of them can be used, and what a head needs of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeflame.dataset import Dataset, ImageRecord
from edgeflame.errors import DataError, UsageError
from edgeflame.frame_sizes import FrameSizes
from edgeflame.layout import GOOD
from edgeflame.log import EventLog
from edgeflame.mark_shapes import paint
from edgeflame.marks import Mark, MarkStore
from edgeflame.methods import Learning
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.tensors import F32, F64
from fitting.crossfit import image_scores, require_enough, score_maps
from fitting.embeddings import Embeddings
from fitting.head_training import HeadImages, describe_images, pool_of, region_of
from fitting.imageset import ImageSet

log = EventLog("marks")

MAX_BAD = 2000
"""Bad marks that a head learns from, the newest; so many take up to 1.8 GB: pictures, embeddings, cells twice."""
SHAPE_LEEWAY = 0.02
"""By how much the width over the height of a mark's picture may differ from that of the photographs."""


@dataclass(frozen=True, kw_only=True)
class SiteMarks:
    """What a site's marks make of its images.

    Attributes:
        images: the good ones, with those marked as good and without those marked as bad.
        bad: pictures marked as bad.
        bad_marks: the marks of these, one for each.
        left_out: reason to the number of marks left out for it.
    """

    images: ImageSet
    bad: ImageSet
    bad_marks: list[Mark]
    left_out: Counter[str]


def read_site_marks(
    store: MarkStore, dataset: Dataset, images: ImageSet, learning: Learning, *, product: str | None
) -> SiteMarks:
    """Read a site's marks.

    Args:
        store: the marks.
        dataset: of the good images.
        images: these.
        learning: the configuration.
        product: marks of others are left out; None: there may be but one.

    Raises:
        DataError: too few good images are left.
        UsageError: there are marks of several products, and none is named.
    """
    left_out: Counter[str] = Counter()
    every = store.marks()
    products = sorted({mark.product for mark in every} - {""})
    if product is None and len(products) > 1:
        raise UsageError(f"{store.folder}: marks of several products ({', '.join(products[:5])}); name one (--product)")
    marks = usable_marks(every, product or "".join(products), left_out)
    frames = FrameSizes.of(images.report.sizes)
    bad_marks = newest([mark for mark in marks if mark.was == "bad"], left_out)
    bad = read_pictures(store, bad_marks, learning, left_out, frames)
    good = read_pictures(store, [mark for mark in marks if mark.was == "good"], learning, left_out, frames)
    if len(good):
        images = ImageSet((*dataset.train, *good.records), learning.input)
    images = without_known_bad(images, set(bad.report.digests.values()), left_out)
    require_enough(len(images), len(set(images.groups)))
    by_name = {name_of(mark): mark for mark in bad_marks}
    log.info("marks", good=len(good), bad=len(bad), **{f"left out, {why}": count for why, count in left_out.items()})
    return SiteMarks(
        images=images, bad=bad, bad_marks=[by_name[record.name] for record in bad.records], left_out=left_out
    )


def usable_marks(marks: Sequence[Mark], product: str, left_out: Counter[str]) -> list[Mark]:
    """Marks of this product that do not contradict each other."""
    of_product = [mark for mark in marks if mark.product in ("", product)]
    leave_out(left_out, f"of another product than {product}", len(marks) - len(of_product))
    said: dict[str, set[str]] = {}
    for mark in of_product:
        said.setdefault(mark.digest or mark.name, set()).add(mark.was)
    kept, seen = [], set()
    for mark in reversed(of_product):
        which = mark.digest or mark.name
        if len(said[which]) > 1:
            leave_out(left_out, "one picture marked both good and bad", 1)
        elif which in seen:
            leave_out(left_out, "one picture marked twice", 1)
        else:
            seen.add(which)
            kept.append(mark)
    return kept[::-1]


def newest(marks: list[Mark], left_out: Counter[str]) -> list[Mark]:
    """The newest ``MAX_BAD`` marks, the oldest of them first."""
    leave_out(left_out, f"older than the newest {MAX_BAD} bad ones", len(marks) - MAX_BAD)
    return sorted(marks, key=lambda mark: mark.marked)[-MAX_BAD:]


def name_of(mark: Mark) -> str:
    """What the picture of a mark is called among the images."""
    return f"marks/{mark.file}"


def read_pictures(
    store: MarkStore, marks: Sequence[Mark], learning: Learning, left_out: Counter[str], frames: FrameSizes | None
) -> ImageSet:
    """The pictures of marks that can be read and have the right shape."""
    records = [
        ImageRecord(
            path=store.picture(mark),
            name=name_of(mark),
            label=GOOD if mark.was == "good" else mark.label,
            group=f"mark:{mark.group}",
            is_cropped=not mark.whole_frame,
        )
        for mark in marks
    ]
    # Each is read once here to know its size, as the camera gave it.
    fitting = [record for record in records if _has_shape(record, learning, frames)]
    leave_out(left_out, "pictures of another shape: another camera or region", len(records) - len(fitting))
    images = ImageSet(fitting, learning.input)
    leave_out(left_out, "pictures that cannot be read", len(fitting) - len(images))
    return images


def _has_shape(record: ImageRecord, learning: Learning, frames: FrameSizes | None) -> bool:
    roi = learning.input.roi
    try:
        frame = learning.input.read(record.path)
    except DataError:
        return True  # it is told when the pictures are read
    height, width = frame.shape[:2]
    if roi is not None and record.is_cropped:
        low = high = roi.width / roi.height
    elif frames is not None:
        low, high = frames.ratios
    else:
        return True
    if roi is not None and not record.is_cropped and (roi.x + roi.width > width or roi.y + roi.height > height):
        return False
    return bool(low * (1 - SHAPE_LEEWAY) <= width / height <= high * (1 + SHAPE_LEEWAY))


def without_known_bad(images: ImageSet, known_bad: set[bytes], left_out: Counter[str]) -> ImageSet:
    """The good images but for those marked as bad, and each but once."""
    kept: list[int] = []
    seen: set[bytes] = set()
    for index, record in enumerate(images.records):
        digest = images.report.digests[record.path]
        if digest in known_bad:
            leave_out(left_out, "good images that a mark calls bad", 1)
        elif digest not in seen:
            seen.add(digest)
            kept.append(index)
    return images if len(kept) == len(images) else images.subset(kept)


def describe_for_head(
    statistics: PackageStatistics,
    embeddings: Embeddings,
    learning: Learning,
    groups: Sequence[str],
    *,
    scores: F64 | None = None,
    kinds: Sequence[str] = (),
    regions: Sequence[F32 | None] = (),
) -> HeadImages:
    """What a head needs of images; good ones come with held-out ``scores``, others are scored here."""
    cells, distances, own = [], [], []
    for _, batch in embeddings.batches(range(len(embeddings))):
        of_batch = describe_images(statistics, batch)
        cells.append(of_batch[0])
        distances.append(of_batch[1])
        if scores is None:
            own.append(image_scores(score_maps(statistics, batch, learning.scoring)))
    grid = statistics.grid
    num_cells = (grid[0] // pool_of(grid)) * (grid[1] // pool_of(grid))
    return HeadImages(
        cells=np.concatenate(cells) if cells else np.zeros((0, num_cells, embeddings.num_channels), np.float16),
        distances=np.concatenate(distances) if distances else np.zeros((0, num_cells), np.float32),
        scores=scores if scores is not None else np.concatenate([*own, np.zeros(0)]).astype(np.float64),
        groups=list(groups),
        kinds=kinds,
        regions=regions,
    )


def describe_marked(
    statistics: PackageStatistics, embeddings: Embeddings, learning: Learning, marks: Sequence[Mark]
) -> HeadImages:
    """What a head needs of images that were marked as bad, each with its mark."""
    images = embeddings.images
    return describe_for_head(
        statistics,
        embeddings,
        learning,
        images.groups,
        kinds=[mark.kind or "" for mark in marks],
        regions=[
            _region(record, mark, learning, statistics.grid) for record, mark in zip(images.records, marks, strict=True)
        ],
    )


def _region(record: ImageRecord, mark: Mark, learning: Learning, grid: tuple[int, int]) -> F32 | None:
    """Share of each cell that a mark covers, ``[Q]``; None if it does not say where the defect is."""
    if not mark.where:
        return None
    preprocessing = learning.input.without_roi() if record.is_cropped else learning.input
    height, width = preprocessing.read(record.path).shape[:2]
    return region_of(preprocessing.crop(paint(mark.where, height=height, width=width)), grid)


def leave_out(left_out: Counter[str], reason: str, count: int) -> None:
    """Count what is left out, and why."""
    if count > 0:
        left_out[reason] += count
