"""The scores of a fit's photographs as a file: what a person looks at before a model goes live.

The scores are by statistics that had not seen the photograph's part. For each threshold that makes a difference among
them the file says how many parts it rejects, and what it promises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from edgeflame.dataset import ImageRecord
from edgeflame.methods import Calibration
from edgeflame.state import check_format_version, read_json, write_json
from edgeflame.threshold import Threshold
from fitting.site_statistics import SiteStatistics

FORMAT = 1
MAX_CHOICES = 60
"""Thresholds offered: the highest ones. Lower ones reject most of the good parts."""


class ScoredPhotograph(msgspec.Struct, frozen=True, kw_only=True):
    """One photograph of the fit."""

    name: str
    """Below the folder of images."""
    part: str
    """What it was taken to show; the same for photographs of one part."""
    score: float
    """Raw distance."""
    left_out: bool = False
    """It looked so little normal that it was left out, as was asked for."""
    map: tuple[tuple[float, ...], ...] = ()
    """The map to show, rows of raw distances; of the least normal ones alone."""


class ThresholdChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One threshold that could be taken."""

    value: float
    rejected_parts: int
    rejected_photographs: int
    expected: float
    """Share of good units to expect above it."""
    promised: float
    """What it promises: an upper bound, with the fit's confidence."""


class MovingPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part that moves the threshold by itself."""

    photographs: tuple[str, ...]
    """Names, the highest score first."""
    without: float
    """What the threshold would be without it, by the same scores."""


class FitScores(msgspec.Struct, frozen=True, kw_only=True):
    """The file."""

    format: int = FORMAT
    threshold: Threshold
    """As it was set."""
    photographs: tuple[ScoredPhotograph, ...]
    """The least normal first."""
    choices: tuple[ThresholdChoice, ...]
    """In rising order; the last one rejects nothing of these."""
    moving: tuple[MovingPart, ...] = ()
    """Parts to be looked at first: any one of them moves the threshold by itself."""


def scores_of(site: SiteStatistics, calibration: Calibration) -> FitScores:
    """The scores of a site's photographs, and the thresholds that make a difference among them."""
    records = site.images.records
    maps = {one.record.name: one.anomaly_map for one in site.suspects}
    photographs = [
        _photograph(record, group, float(score), maps)
        for record, group, score in zip(records, site.images.groups, site.held_out_scores, strict=True)
    ]
    photographs += [
        msgspec.structs.replace(_photograph(one.record, one.record.group, one.score, maps), left_out=True)
        for one in site.suspects
        if one.left_out
    ]
    return FitScores(
        threshold=site.threshold,
        photographs=tuple(sorted(photographs, key=lambda one: (-one.score, one.name))),
        choices=_choices(site, calibration),
        moving=tuple(
            MovingPart(photographs=tuple(records[index].name for index in one.images), without=one.without)
            for one in site.influential
        ),
    )


def write_scores(path: Path, scores: FitScores) -> None:
    """Write the file, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    write_json(path, scores)


def read_scores(path: Path) -> FitScores | None:
    """Read the file; None if there is none.

    Raises:
        StorageError: it cannot be read, is damaged, or of a later version.
    """
    found = read_json(path, FitScores, advice="fit again")
    if found is not None:
        check_format_version(f"{path}: the scores", found=found.format, known=FORMAT)
    return found


def _photograph(record: ImageRecord, group: str, score: float, maps: Mapping[str, np.ndarray]) -> ScoredPhotograph:
    shown = maps.get(record.name)
    rows = () if shown is None else tuple(tuple(round(float(value), 4) for value in row) for row in shown)
    return ScoredPhotograph(name=record.name, part=group, score=score, map=rows)


def _choices(site: SiteStatistics, calibration: Calibration) -> tuple[ThresholdChoice, ...]:
    from fitting.threshold import GoodScores, upper_confidence_bound

    good = GoodScores(site.held_out_scores, site.images.groups, calibration.unit, site.others)
    above_all = math.nextafter(float(good.candidates[-1]) * 1.05, math.inf)
    values = sorted({*map(float, good.candidates[-MAX_CHOICES:]), site.threshold.value, above_all})
    choices = []
    for value in values:
        shares = good.shares(value)
        choices.append(
            ThresholdChoice(
                value=value,
                rejected_parts=int(np.count_nonzero(shares)),
                rejected_photographs=int(np.count_nonzero(good.scores > value)),
                expected=good.expected_rate(value),
                promised=upper_confidence_bound(shares, calibration.confidence),
            )
        )
    return tuple(choices)
