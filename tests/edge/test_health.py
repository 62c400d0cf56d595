"""Image health: faults of camera and lamp are seen, good pictures are left alone."""

from __future__ import annotations

import numpy as np
import pytest

from edge.health import HealthLimits, image_faults
from edge.verdict import Reason
from edgeflame.boards import TEXTURES, BoardStream
from edgeflame.errors import ConfigError

NOISE = np.random.default_rng(0).integers(0, 4, (64, 64, 3), dtype=np.uint8)


def flat(value: int) -> np.ndarray:
    return np.full((64, 64, 3), value, dtype=np.uint8)


def test_good_pictures_have_no_faults() -> None:
    for texture in TEXTURES:
        for part in BoardStream(texture=texture, num_parts=2, image_size=64, defect_rate=0.5):
            assert image_faults(part.image_bgr, HealthLimits()) == ()


@pytest.mark.parametrize(
    ("image", "faults"),
    [
        (flat(0), (Reason.TOO_DARK, Reason.BLANK)),
        (flat(255), (Reason.TOO_BRIGHT, Reason.BLANK)),
        (flat(128), (Reason.BLANK,)),
        (NOISE, (Reason.TOO_DARK,)),
        (255 - NOISE, (Reason.TOO_BRIGHT,)),
    ],
)
def test_faults_are_named(image: np.ndarray, faults: tuple[Reason, ...]) -> None:
    assert image_faults(image, HealthLimits()) == faults


def test_checks_can_be_switched_off() -> None:
    anything = HealthLimits(min_mean=0, max_mean=255, min_spread=0)
    assert image_faults(flat(0), anything) == image_faults(flat(255), anything) == ()


@pytest.mark.parametrize("limits", [{"min_mean": 200, "max_mean": 100}, {"min_mean": -1}, {"min_spread": 200}])
def test_impossible_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        HealthLimits(**limits)
