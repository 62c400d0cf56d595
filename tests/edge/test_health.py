"""Image health: faults of camera and lamp are seen, good pictures are left alone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from edge.health import FreezeDetector, HealthLimits, image_faults, sharpness
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


def test_a_picture_out_of_focus_is_told_from_the_references() -> None:
    part = next(iter(BoardStream(texture="warm_wood", num_parts=1, image_size=128, defect_rate=0.0)))
    limits = HealthLimits(min_sharpness=0.3)
    sharp = sharpness(part.image_bgr)
    blurred = np.asarray(cv2.GaussianBlur(part.image_bgr, (0, 0), 3), np.uint8)
    assert image_faults(part.image_bgr, limits, reference_sharpness=sharp) == ()
    assert image_faults(blurred, limits, reference_sharpness=sharp) == (Reason.OUT_OF_FOCUS,)
    assert image_faults(blurred, HealthLimits(), reference_sharpness=sharp) == ()  # off unless asked for
    assert image_faults(blurred, limits) == ()  # nothing to compare with


def test_a_frozen_camera_repeats_itself_to_the_last_bit() -> None:
    detector = FreezeDetector(max_repeats=2)
    assert [detector.is_frozen(NOISE) for _ in range(5)] == [False, False, False, True, True]
    assert not detector.is_frozen(NOISE ^ 1)
    assert not detector.is_frozen(NOISE)
    anything = FreezeDetector(max_repeats=0)
    assert not any(anything.is_frozen(NOISE) for _ in range(9))


@pytest.mark.parametrize("keys", [{"min_sharpness": 1.5}, {"min_sharpness": -0.1}, {"max_repeats": -1}])
def test_limits_that_make_no_sense_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="health"):
        HealthLimits(**keys)  # type: ignore[arg-type]
