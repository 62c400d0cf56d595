"""Image health: faults of camera and lamp are seen, good pictures are left alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from boards.camera import Camera
from boards.dataset import BoardStream
from boards.textures import TEXTURES
from edge.config.inspection import ImageQualityConfig
from edge.health import ColourCheck, FreezeDetector, ImageHealth, ShiftCheck, image_faults, sharpness
from edge.result import Reason
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError
from edgeflame.frame_sizes import FrameSizes
from edgeflame.images import read_image

NOISE = np.random.default_rng(0).integers(0, 4, (64, 64, 3), dtype=np.uint8)


def flat(value: int) -> np.ndarray:
    return np.full((64, 64, 3), value, dtype=np.uint8)


def test_good_pictures_have_no_faults() -> None:
    for texture in TEXTURES:
        for part in BoardStream(texture=texture, num_parts=2, image_size=64, defect_rate=0.5):
            assert image_faults(part.image_bgr, ImageQualityConfig()) == ()


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
    assert image_faults(image, ImageQualityConfig()) == faults


def test_checks_can_be_switched_off() -> None:
    anything = ImageQualityConfig(min_mean=0, max_mean=255, min_spread=0)
    assert image_faults(flat(0), anything) == image_faults(flat(255), anything) == ()


@pytest.mark.parametrize("limits", [{"min_mean": 200, "max_mean": 100}, {"min_mean": -1}, {"min_spread": 200}])
def test_impossible_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        parse_config(b"", ImageQualityConfig, "image_quality", limits)


def test_a_picture_out_of_focus_is_told_from_the_references() -> None:
    part = next(iter(BoardStream(texture="warm_wood", num_parts=1, image_size=128, defect_rate=0.0)))
    limits = ImageQualityConfig(min_sharpness=0.3)
    sharp = sharpness(part.image_bgr)
    blurred = np.asarray(cv2.GaussianBlur(part.image_bgr, (0, 0), 3), np.uint8)
    assert image_faults(part.image_bgr, limits, reference_sharpness=sharp) == ()
    assert image_faults(blurred, limits, reference_sharpness=sharp) == (Reason.OUT_OF_FOCUS,)
    assert image_faults(blurred, ImageQualityConfig(), reference_sharpness=sharp) == ()  # off unless asked for
    assert image_faults(blurred, limits) == ()  # nothing to compare with


def test_a_frozen_camera_repeats_itself_to_the_last_bit() -> None:
    detector = FreezeDetector(max_repeats=2)
    assert [detector.is_frozen(NOISE) for _ in range(5)] == [False, False, False, True, True]
    assert not detector.is_frozen(NOISE ^ 1)
    assert not detector.is_frozen(NOISE)
    anything = FreezeDetector(max_repeats=0)
    assert not any(anything.is_frozen(NOISE) for _ in range(9))


@pytest.mark.parametrize(
    "keys",
    [{"min_sharpness": 1.5}, {"min_sharpness": -0.1}, {"max_repeats": -1}, {"min_colour": 1.0}, {"max_shift": -0.1}],
)
def test_limits_that_make_no_sense_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="image_quality"):
        parse_config(b"", ImageQualityConfig, "image_quality", keys)


BOARD_LINES = [(texture, site) for texture in TEXTURES for site in (1, 2, 3)]


def boards(texture: str, site: int, count: int, defect_rate: float = 0.3, *, size: int = 128) -> list[np.ndarray]:
    stream = BoardStream(
        texture=texture, num_parts=count, image_size=size, defect_rate=defect_rate, camera=Camera.for_site(site, 0)
    )
    return [part.image_bgr for part in stream]


def grey(image: np.ndarray) -> np.ndarray:
    """As a camera gives it that fell back to grey, through a JPEG."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR))
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


@pytest.mark.parametrize(("texture", "site"), BOARD_LINES)
def test_colours_that_are_lost_or_exchanged_are_seen_and_others_left_alone(texture: str, site: int) -> None:
    references, parts = boards(texture, site, 4, 0.0), boards(texture, site, 12)
    check = ColourCheck(references, ImageQualityConfig().min_colour)
    for part in parts:
        assert check.faults(part) == ()
        assert check.faults(cv2.convertScaleAbs(part, alpha=0.7)) == ()  # a lamp that ages
        assert check.faults(grey(part)) == (Reason.COLOUR_LOST,)
        exchanged = check.faults(np.ascontiguousarray(part[..., ::-1]))
        if texture == "green_grey_wood":  # as much red as blue, or nearly
            assert exchanged in ((), (Reason.COLOUR_SWAPPED,))
        elif (texture, site) != ("warm_white_grid", 2):  # a cast of 7 levels, too little to be sure
            assert exchanged == (Reason.COLOUR_SWAPPED,)


def test_a_grey_product_and_no_references_say_nothing_about_colours() -> None:
    colourful = boards("warm_wood", 1, 1)[0]
    for check in (ColourCheck([grey(colourful)], 0.25), ColourCheck([], 0.25), ColourCheck([colourful], 0.0)):
        assert check.faults(grey(colourful)) == check.faults(colourful[..., ::-1].copy()) == ()


def on_fixture(board: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A board between the three pins that hold it, which stay where they are, with a sensor's noise."""
    image = board.copy()
    for x, y in ((15, 15), (113, 17), (64, 115)):
        cv2.circle(image, (2 * x, 2 * y), 10, (20, 20, 20), -1)
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def moved(image: np.ndarray, share: float) -> np.ndarray:
    side = image.shape[1]
    matrix = np.array([[1, 0, share * side], [0, 1, 0.5 * share * side]], np.float32)
    return np.asarray(cv2.warpAffine(image, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE), np.uint8)


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_camera_that_was_moved_is_seen_by_what_stays_in_its_place(texture: str) -> None:
    rng = np.random.default_rng(0)
    images = [on_fixture(board, rng) for board in boards(texture, 1, 12, size=256)]
    check = ShiftCheck(images[:4], max_shift=0.03)
    for image in images[4:]:
        assert not check.is_shifted(image)
        assert not check.is_shifted(cv2.convertScaleAbs(image, alpha=0.7))
        assert not check.is_shifted(moved(image, 0.01))
        for share in (0.06, 0.12, 0.25):
            assert check.is_shifted(moved(image, share))


def test_where_nothing_stays_in_its_place_the_check_is_refused() -> None:
    rng = np.random.default_rng(0)
    textures = [cv2.resize(rng.integers(0, 255, (16, 16, 3), np.uint8), (128, 128)) for _ in range(4)]
    with pytest.raises(ConfigError, match=r"show nothing that stays in its place within 0\.05 of the side"):
        ShiftCheck(textures, max_shift=0.05)
    with pytest.raises(ConfigError, match="needs 3 of them, not 1"):
        ShiftCheck(textures[:1], max_shift=0.05)


@pytest.mark.magnetic_tile
def test_photographs_without_anything_in_common_are_refused_and_without_colours_left_alone(magnetic_tile: Path) -> None:
    files = sorted((magnetic_tile / "train" / "good").iterdir())[::60]
    tiles = [cv2.resize(read_image(file), (256, 256), interpolation=cv2.INTER_AREA) for file in files]
    with pytest.raises(ConfigError, match="nothing that stays in its place"):
        ShiftCheck(tiles[:4], max_shift=0.1)
    health = ImageHealth(ImageQualityConfig(), tiles[:4], is_live=False)
    assert {health.faults(tile) for tile in tiles} == {()}


def test_a_live_camera_keeps_to_the_size_of_its_first_frame() -> None:
    small, large = np.zeros((48, 64, 3), np.uint8), np.zeros((96, 128, 3), np.uint8)
    live = ImageHealth(ImageQualityConfig(), [], is_live=True)
    assert [bool(live.size_fault(frame)) for frame in (small, small, large, small)] == [False, False, True, False]
    files = ImageHealth(ImageQualityConfig(), [], is_live=False)
    assert not any(files.size_fault(frame) for frame in (small, large))
    stated = ImageHealth(ImageQualityConfig(), [], is_live=True, frame=(128, 96))
    assert [bool(stated.size_fault(frame)) for frame in (small, large)] == [True, False]


def test_a_live_camera_that_begins_with_another_size_than_the_models_may_come_to_it() -> None:
    small, large = np.zeros((48, 64, 3), np.uint8), np.zeros((96, 128, 3), np.uint8)
    made_of = FrameSizes.of([(128, 96)])
    live = ImageHealth(ImageQualityConfig(), [], is_live=True, made_of=made_of)
    assert [bool(live.size_fault(frame)) for frame in (small, large, small)] == [True, False, True]


def test_sizes_that_the_model_was_made_of_are_a_range() -> None:
    assert FrameSizes.of([]) is None
    one, several = FrameSizes.of([(256, 256)]), FrameSizes.of([(1920, 1080), (640, 480), (800, 600)])
    assert one is not None
    assert several is not None
    sizes = [(256, 256), (64, 64), (512, 512), (256, 255), (1920, 540)]
    assert [one.has(*size) for size in sizes] == [True, False, False, False, False]
    # Photographs of several sizes are cut-outs as they come: one a little beyond the others is no other shape.
    sizes = [(640, 480), (1280, 960), (1920, 1080), (639, 479), (1990, 1120)]
    assert all(several.has(*size) for size in sizes)
    assert not any(several.has(*size) for size in [(1920, 540), (480, 640), (500, 375), (2500, 1400)])
    assert (str(one), str(several)) == ("256x256", "640x480 to 1920x1080")


def test_one_reason_is_enough_for_a_dark_picture_but_a_frozen_one_is_still_counted() -> None:
    health = ImageHealth(ImageQualityConfig(max_repeats=1), boards("warm_wood", 1, 2, 0.0), is_live=True)
    dark = np.zeros((128, 128, 3), np.uint8)
    assert health.faults(dark) == (Reason.TOO_DARK, Reason.BLANK)
    assert [health.is_frozen(dark) for _ in range(3)] == [False, False, True]
