"""What a site adds to a backbone: its statistics and its threshold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeflame.statistics_codec import PackageStatistics
from edgeflame.threshold import Threshold
from trainer.imageset import ImageSet
from trainer.suspects import Suspect


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """What a site adds to a backbone.

    Attributes:
        statistics: of all its good images, as a package stores them.
        threshold: by cross-fitting over its parts.
        images: those it rests on: all that could be read, but for those left out.
        held_out_scores: ``[N]`` of these images, by statistics that did not see them.
        held_out_means: ``[N]`` means of the maps whose maxima these scores are.
        suspects: of all images those that look least normal, the worst first.
        details: for the package's provenance: rank, likelihoods, counts, seconds.
    """

    statistics: PackageStatistics
    threshold: Threshold
    images: ImageSet
    held_out_scores: npt.NDArray[np.float64]
    held_out_means: npt.NDArray[np.float64]
    suspects: tuple[Suspect, ...]
    details: dict[str, Any] = field(default_factory=dict)
