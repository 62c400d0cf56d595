"""What an evaluation found, as data: the JSON of ``edgeflame evaluate`` is this.

All figures are fractions of 1, and None where they are not defined. An interval is 95%: of the figures by bootstrap
over parts (:mod:`trainer.bootstrap`), of rejected shares by the bound that thresholds rest on
(:mod:`trainer.confidence`).
"""

from __future__ import annotations

import msgspec

Interval = tuple[float, float]


class ClassReport(msgspec.Struct, frozen=True, kw_only=True):
    """One defect class: its images against the good ones, its pixels over its own images."""

    num_images: int
    num_groups: int
    num_with_mask: int
    image_AUROC: float | None
    pixel_AUROC: float | None
    pixel_AUPRO: float | None
    image_F1Max: float | None
    caught: int
    """Images above the threshold."""
    caught_interval: Interval | None
    intervals: dict[str, Interval]
    """By the figure's name."""
    without_interval: dict[str, str]
    """Figures that have none, and why."""


class PromiseOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one of the package's thresholds does to the test images."""

    false_reject_rate: float
    """What it promises at most."""
    threshold: float
    good_rejected: int
    defective_caught: int


class EvaluationReport(msgspec.Struct, frozen=True, kw_only=True):
    """A test set's figures; ``macro_*`` are means over the classes."""

    image_AUROC: float | None
    pixel_AUROC: float | None
    pixel_AUPRO: float | None
    image_F1Max: float | None
    macro_image_AUROC: float | None
    macro_pixel_AUROC: float | None
    macro_pixel_AUPRO: float | None
    macro_image_F1Max: float | None
    intervals: dict[str, Interval]
    """By the figure's name."""
    without_interval: dict[str, str]
    """Figures that have none, and why."""
    num_resamples: int
    """Of the bootstrap."""
    image_F1Max_threshold: float | None
    pixel_F1Max: float | None
    pixel_F1Max_threshold: float | None
    """Where the masks of these very images are met best; a threshold for looking, not for judging."""
    per_class: dict[str, ClassReport]
    threshold: float
    num_images: int
    num_good: int
    num_defective: int
    num_groups: int
    groups_known: bool
    num_unreadable: int
    good_passed: int
    good_rejected: int
    good_rejected_interval: Interval | None
    defective_caught: int
    defective_caught_interval: Interval | None
    defective_missed: int
    promises: tuple[PromiseOutcome, ...]
    """What the package's other thresholds would have done; empty where it names none."""
