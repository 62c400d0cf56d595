"""From a package and marks to a candidate package, without torch.

Good marks are good parts like all others: they enter statistics and threshold. Bad marks train a head
(:mod:`fitting.head_training`), which :mod:`fitting.defect_head` weighs, and move the threshold as labelled defects do
(:mod:`fitting.expected_cost`), with scores of statistics and heads that did not see them. What comes out is compared
with the present package on the same scores.

What marks cannot be used, or say two things, is left out and told:

- marks of another product;
- pictures of another shape than the photographs that the package was made of: another camera, another region;
- a picture that is marked good and bad, under two names;
- good pictures to learn from that are marked as bad: the mark counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeflame.dataset import Dataset, UnreadablePolicy
from edgeflame.errors import UsageError
from edgeflame.log import EventLog
from edgeflame.marks import MarkStore
from edgeflame.methods import Learning
from edgeflame.package import Package
from edgeflame.statistics.gaussian import LowRankGaussian
from edgeflame.tensors import F64
from fitting.crossfit import image_scores, score_maps
from fitting.defect_head import HeadFit, fit_head
from fitting.embeddings import Embedder, Embeddings
from fitting.expected_cost import set_least_cost
from fitting.fit import Stage, quiet_stage, read_training_images
from fitting.imageset import ImageSet
from fitting.marked_images import (
    describe_for_head,
    describe_marked,
    name_of,
    newest,
    read_pictures,
    usable_marks,
    without_known_bad,
)
from fitting.prior import FleetPrior
from fitting.site_statistics import SiteStatistics, find_influential, fit_statistics
from fitting.threshold import set_threshold

log = EventLog("learn")


@dataclass(frozen=True, kw_only=True)
class MarkComparison:
    """The candidate beside the present package, on parts that the candidate did not see."""

    num_bad: int
    """Bad images that were marked."""
    missed: int
    """Of them, by the present package."""
    caught: int
    """Of those missed, by the candidate."""
    lost: int
    """Missed by the candidate, of those that the present package catches."""
    num_good: int
    rejected_before: int
    rejected: int
    """Of the good ones, by the present package and by the candidate."""

    def __str__(self) -> str:
        more = self.rejected - self.rejected_before
        if self.num_bad == 0:
            text = "no bad part is marked; it would have"
        else:
            text = f"would have caught {self.caught} of the {self.missed} marked bad that the present package misses"
            if self.lost:
                text += f", missed {self.lost} that it catches"
            text += ", and"
        few = "fewer" if more < 0 else "more"
        return f"{text} rejected {abs(more)} {few} of {self.num_good} good"


@dataclass(frozen=True, kw_only=True)
class LearntModel:
    """What was learnt from marks.

    Attributes:
        site: statistics, threshold and held-out scores with the head; without one where it would not help, or there
            are too few marks.
        comparison: with the present package.
        left_out: reason to the number of marks left out for it.
        details: for a package's provenance.
    """

    site: SiteStatistics
    comparison: MarkComparison
    left_out: Counter[str]
    details: dict[str, Any]


def learn(
    package: Package,
    embedder: Embedder,
    dataset: Dataset,
    store: MarkStore,
    *,
    cost_of_miss: float,
    prior: FleetPrior | None = None,
    on_unreadable: UnreadablePolicy = "skip",
    stage: Stage = quiet_stage,
) -> LearntModel:
    """Learn from marks.

    Args:
        package: the present one.
        embedder: its network.
        dataset: good photographs to learn from, as for a fit; those that the package was fitted on, or newer ones.
        store: the marks.
        cost_of_miss: of a missed defective part against a rejected good one.
        prior: what the statistics lean on, as in a fit.
        on_unreadable: what to do about photographs that cannot be read.
        stage: shows the progress of each stage.

    Raises:
        UsageError: the package has no Gaussian statistics, or no mark can be used.
        DataError: too few good images.
        NumericalError: an embedding is not finite.
    """
    manifest = package.manifest
    learning = manifest.learning
    if not isinstance(package.statistics, LowRankGaussian):
        raise UsageError("this package scores by a memory; marks are learnt by packages with Gaussian statistics only")
    if prior is None and "prior" in manifest.provenance.get("statistics", {}):
        log.warning("prior_left_out", note="the package leans on other statistics; the candidate on these images alone")
    left_out: Counter[str] = Counter()
    marks = usable_marks(store.marks(), manifest.product, left_out)
    with stage("Reading images") as progress:
        bad_marks = newest([mark for mark in marks if mark.was == "bad"], left_out)
        bad = read_pictures(store, bad_marks, learning, left_out, manifest.frames)
        known_bad = set(bad.report.digests.values())
        good_marks = [mark for mark in marks if mark.was == "good"]
        marked_good = read_pictures(store, good_marks, learning, left_out, manifest.frames)
        with_marks = replace(dataset, train=(*dataset.train, *marked_good.records))
        images = without_known_bad(
            read_training_images(with_marks, learning, on_unreadable=on_unreadable, progress=progress),
            known_bad,
            left_out,
        )
    if not len(bad) and not len(marked_good):
        raise UsageError(f"{store.folder}: no mark can be used{_reasons(left_out)}")
    embeddings = Embeddings(embedder, images)
    with stage("Statistics and threshold") as progress:
        site = fit_statistics(embeddings, learning, groups_known=dataset.groups_known, pooled=prior, progress=progress)
        if len(site.images) != len(images):
            embeddings = Embeddings(embedder, site.images)
    with stage("Learning from marks"):
        good_images = describe_for_head(
            site.statistics, embeddings, learning, site.images.groups, scores=site.held_out_scores
        )
        of_bad = {name_of(mark): mark for mark in bad_marks}
        bad_embeddings = Embeddings(embedder, bad)
        bad_images = describe_marked(
            site.statistics, bad_embeddings, learning, [of_bad[record.name] for record in bad.records]
        )
        fitted = (
            fit_head(good_images, bad_images, grid=site.statistics.grid, seed=learning.seed)
            if len(bad)
            else HeadFit(head=None, good_scores=good_images.scores, bad_scores=np.zeros(0))
        )
        threshold = set_threshold(
            fitted.good_scores,
            site.images.groups,
            learning.calibration,
            groups_known=dataset.groups_known,
            num_left_out=site.threshold.num_left_out,
            others=site.others,
        )
        influential = find_influential(site.images, fitted.good_scores, learning, threshold, site.others)
        if len(bad):
            threshold = set_least_cost(
                threshold,
                fitted.good_scores,
                site.images.groups,
                fitted.bad_scores,
                bad_images.groups,
                cost_of_miss=cost_of_miss,
                seed=learning.seed,
            )
        before_bad = _present_scores(package, bad_embeddings, learning)
        before_good = site.held_out_scores if package.head is None else _present_scores(package, embeddings, learning)
    present = manifest.threshold.value
    missed = before_bad <= present
    caught = fitted.bad_scores > threshold.value
    comparison = MarkComparison(
        num_bad=len(bad),
        missed=int(missed.sum()),
        caught=int((missed & caught).sum()),
        lost=int((~missed & ~caught).sum()),
        num_good=len(site.images),
        rejected_before=int((before_good > present).sum()),
        rejected=int((fitted.good_scores > threshold.value).sum()),
    )
    details: dict[str, Any] = {
        "previous_package": package.sha256,
        "num_good_marks": len(marked_good),
        "num_bad_marks": len(bad),
        "left_out": dict(left_out),
        "head": fitted.details,
        "comparison": str(comparison),
        "look_at": _look_at(site, bad, fitted),
    }
    log.info("learnt_from_marks", good=len(marked_good), bad=len(bad), has_head=fitted.head is not None)
    images.report.digests.update(bad.report.digests)
    return LearntModel(
        site=site.with_head(fitted.head, fitted.good_scores, threshold, influential),
        comparison=comparison,
        left_out=left_out,
        details=details,
    )


def _present_scores(package: Package, embeddings: Embeddings, learning: Learning) -> F64:
    """What the present package says of images, ``[N]``."""
    scores = [np.zeros(0)]
    for _, batch in embeddings.batches(range(len(embeddings))):
        of_batch = image_scores(score_maps(package.statistics, batch, learning.scoring)).astype(np.float64)
        if package.head is not None:
            of_batch = of_batch * np.exp(package.head.log_factors(batch))
        scores.append(of_batch)
    return np.concatenate(scores)


def _look_at(site: SiteStatistics, bad: ImageSet, fitted: HeadFit) -> list[str]:
    """Marks that others contradict most: perhaps they are wrong."""
    good = [
        (float(score), record.name)
        for score, record in zip(fitted.good_scores, site.images.records, strict=True)
        if record.name.startswith("marks/")
    ]
    odd = [name for score, name in sorted(good, reverse=True)[:3] if score > fitted.good_scores.mean() * 1.5]
    usual = np.median(fitted.good_scores)
    unclear = [
        (float(score), record.name)
        for score, record in zip(fitted.bad_scores, bad.records, strict=True)
        if score < usual
    ]
    return [*odd, *(name for _, name in sorted(unclear)[:3])]


def _reasons(left_out: Counter[str]) -> str:
    return "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())
