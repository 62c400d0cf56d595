"""Region of interest and ignore masks: what is not judged cannot reject, and all else is judged as before."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cli import cli
from edge.config import InspectConfig
from edge.config.inspection import RoiConfig
from edge.frame import Captured, make_frame
from edge.inspector import Inspector
from edge.overlay import LIGHT_LEFT, draw_overlay
from edge.result import Inspected
from edge.runtimes.interface import Runtime, Scores
from edge.runtimes.load import open_runtime
from edge.view import View
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, DataError
from edgeflame.images import ImageU8, Preprocessing, Region, read_image, write_image
from edgeflame.package import Package
from tests.support.inspection_results import judge
from tests.support.small_package import GRID, PREPROCESSING, SIZE, bad_image, good_image

CELL = SIZE // GRID


def view(preprocessing: Preprocessing = PREPROCESSING, **keys: object) -> View:
    return View(RoiConfig(**keys), preprocessing, (GRID, GRID))  # type: ignore[arg-type]


def inspect(package: Package, image: ImageU8, runtime: Runtime | None = None, **keys: object) -> Inspected:
    runtime = runtime or open_runtime(package.model_onnx, device="cpu")
    inspector = Inspector(package, runtime, InspectConfig(roi=RoiConfig(**keys)))  # type: ignore[arg-type]
    frame = make_frame(part_id="p", source="s", image_bgr=image)
    return judge(inspector, Captured(sequence=0, frame=frame))


def slow_reference(height: int, width: int, covered: list[tuple[int, int]]) -> np.ndarray:
    """Cells all of whose pixels are covered, looked at one by one."""
    judged = np.ones((GRID, GRID), bool)
    pixels = set(covered)
    for row in range(GRID):
        for column in range(GRID):
            rows = range(row * height // GRID, (row + 1) * height // GRID)
            columns = range(column * width // GRID, (column + 1) * width // GRID)
            judged[row, column] = not all((x, y) in pixels for y in rows for x in columns)
    return judged


def test_without_a_view_all_is_judged() -> None:
    fitted = view().fit(height=100, width=100)
    assert fitted.judged is None
    assert fitted.ignored is None
    anomaly_map = np.ones((GRID, GRID), np.float32)
    assert fitted.mask(anomaly_map) is anomaly_map


@pytest.mark.parametrize("make", [good_image, bad_image])
def test_a_mask_that_covers_no_whole_cell_leaves_the_graphs_own_score(package: Package, make: object) -> None:
    image = make(3, 2 * SIZE)  # type: ignore[operator]
    without = inspect(package, image)
    # All but a line of every cell: it is judged by the maximum of the map, and that is what the graph says.
    ignore = [(0, y + 1, 2 * SIZE, 2 * CELL - 1) for y in range(0, 2 * SIZE, 2 * CELL)]
    masked = inspect(package, image, ignore=tuple(ignore))
    assert masked.ignored is not None
    assert masked.result.score == without.result.score
    assert masked.result.verdict == without.result.verdict
    np.testing.assert_array_equal(masked.anomaly_map, without.anomaly_map)


def test_a_defect_that_is_ignored_does_not_reject_and_one_beside_it_does(package: Package) -> None:
    image = bad_image(3)
    assert inspect(package, image).result.verdict == "fail"
    # The hole is at 16..31; the map's smoothing reaches three cells and more over its edge.
    hidden = inspect(package, image, ignore=((0, 0, SIZE, 7 * CELL),))
    assert hidden.result.verdict == "pass"
    assert hidden.anomaly_map is not None
    assert hidden.anomaly_map[:7].max() == 0
    assert hidden.result.score == hidden.anomaly_map.max() > 0
    # The same area ignored, a defect where it is judged.
    turned = np.ascontiguousarray(image[::-1])
    assert inspect(package, turned, ignore=((0, 0, SIZE, 4 * CELL),)).result.verdict == "fail"
    # One row of pixels of a cell is enough for it to count.
    assert inspect(package, image, ignore=((0, 1, SIZE, 4 * CELL - 1), (0, 32, 1, 1))).result.verdict == "fail"


def test_what_lies_outside_the_region_of_interest_is_not_judged(package: Package) -> None:
    image = bad_image(3)
    assert inspect(package, image, roi=(0, 56, 64, 8)).result.verdict == "pass"
    assert inspect(package, image, roi=(8, 8, 32, 32)).result.verdict == "fail"


@pytest.mark.parametrize(("height", "width"), [(64, 64), (120, 200), (96, 64)])
def test_cells_are_left_out_only_where_they_are_covered_wholly(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    for _ in range(20):
        x, y = int(rng.integers(0, width - 1)), int(rng.integers(0, height - 1))
        w, h = int(rng.integers(1, width - x + 1)), int(rng.integers(1, height - y + 1))
        covered = [(x + i, y + j) for i in range(w) for j in range(h)]
        expected = slow_reference(height, width, covered)
        if not expected.any():
            continue
        fitted = view(ignore=((x, y, w, h),)).fit(height=height, width=width)
        np.testing.assert_array_equal(fitted.judged, expected)


def test_polygon_and_picture_cover_what_a_rectangle_covers(tmp_path: Path) -> None:
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture[8:32, 16:48] = (0, 0, 9)  # not black
    write_image(tmp_path / "mask.png", picture)
    rectangle = view(ignore=((16, 8, 32, 24),)).fit(height=SIZE, width=SIZE)
    polygon = view(ignore=(((16, 8), (47, 8), (47, 31), (16, 31)),)).fit(height=SIZE, width=SIZE)
    drawn = view(ignore_image=str(tmp_path / "mask.png")).fit(height=SIZE, width=SIZE)
    assert rectangle.judged is not None
    assert (~rectangle.judged).sum() == 12
    for other in (polygon, drawn):
        np.testing.assert_array_equal(other.judged, rectangle.judged)
        np.testing.assert_array_equal(other.ignored, rectangle.ignored)


def test_shapes_are_of_the_frame_and_the_crop_may_be_another() -> None:
    region = Preprocessing(height=SIZE, width=SIZE, roi=Region(x=100, y=0, width=64, height=64))
    fitted = view(region, ignore=((100, 0, 64, 8),)).fit(height=100, width=200)
    assert fitted.judged is not None
    np.testing.assert_array_equal(fitted.judged.all(axis=1), [False] + [True] * 7)
    moved = view(region, crop=(36, 20, 64, 64))
    frame = np.arange(100 * 200 * 3, dtype=np.uint8).reshape(100, 200, 3)
    np.testing.assert_array_equal(moved.preprocessing.apply(frame), frame[20:84, 36:100])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_a_fault_also_where_nothing_is_judged(package: Package, value: float) -> None:
    class Broken:
        provider, input_size, grid, precision = "fake", (SIZE, SIZE), (GRID, GRID), "fp32"

        def __init__(self, score: float, in_map: float) -> None:
            self.maps = np.zeros((1, GRID, GRID), np.float32)
            self.maps[0, 0, 0] = in_map
            self.scores = np.array([score], np.float32)

        def score(self, batch: ImageU8) -> Scores:
            return Scores(self.scores, self.maps)

    for broken in (Broken(value, 0.0), Broken(0.5, value)):
        result = inspect(package, good_image(1), broken, ignore=((0, 0, 32, 32),)).result
        assert (result.verdict, result.reasons) == ("unknown", ("score_not_finite",))


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("frame = [0, 480]", r"roi\.frame must be a list of 2 values, each 1..1000000, not \[0, 480\]"),
        (
            "roi = [0, 0, 0, 5]",
            r"roi\.roi is \[x, y, width, height\] with an area, in pixels from 0, not \[0, 0, 0, 5\]",
        ),
        ("roi = [0, 0, 5]", r"roi\.roi must be a list of 4 values"),
        ("crop = [-1, 0, 5, 5]", r"roi\.crop is"),
        ("ignore = [[1, 2, 3]]", r"roi\.ignore is .* or a polygon of three points or more"),
        ("ignore = [[[1, 2], [3, 4]]]", r"roi\.ignore .*not \[\[1, 2\], \[3, 4\]\]"),
        ("ignore = [[[1, 2], [3, 4], [5, 6]]]", "with an area"),
        ("ignore = [[[1, 2], 3, [5, 6]]]", r"roi\.ignore"),
        ("ignore = [[0.5, 0, 3, 3]]", r"roi\.ignore must be a list"),
        ("ignored = []", "unknown key `ignored`"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(toml: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(f"[roi]\n{toml}\n".encode(), InspectConfig, "line.toml")


def test_masks_that_leave_nothing_or_reach_outside_are_refused_as_soon_as_the_frames_size_is_known(
    tmp_path: Path,
) -> None:
    outside = r"roi\.ignore \[60, 0, 10, 10\] reaches outside the 64x64 frame"
    nothing = "leave nothing to judge of the 64x64 frame"
    for shapes, message in (((60, 0, 10, 10), outside), ((0, 0, 64, 64), nothing)):
        with pytest.raises(DataError, match=message):
            view(ignore=(shapes,)).fit(height=64, width=64)
        with pytest.raises(ConfigError, match=message):
            view(ignore=(shapes,), frame=(64, 64))
    write_image(tmp_path / "white.png", np.full((64, 64, 3), 255, np.uint8))
    with pytest.raises(ConfigError, match=nothing):
        view(ignore_image=str(tmp_path / "white.png"))
    with pytest.raises(ConfigError, match=r"white\.png has 64x64 pixels, roi\.frame says \[640, 480\]"):
        view(ignore_image=str(tmp_path / "white.png"), frame=(640, 480))
    with pytest.raises(ConfigError, match=r"roi\.ignore_image: .*none\.png: cannot be read"):
        view(ignore_image=str(tmp_path / "none.png"))
    region = Preprocessing(height=SIZE, width=SIZE, roi=Region(x=100, y=0, width=64, height=64))
    with pytest.raises(ConfigError, match="reaches outside"):
        view(region, roi=(100, 0, 8, 8), frame=(120, 64))


def test_a_frame_the_mask_does_not_fit_is_unknown_and_no_crash(package: Package, tmp_path: Path) -> None:
    result = inspect(package, good_image(1), ignore=((60, 0, 10, 10),)).result
    assert (result.verdict, result.reasons) == ("unknown", ("unfit_image",))
    assert "reaches outside the 64x64 frame" in (result.detail or "")
    write_image(tmp_path / "mask.png", np.zeros((32, 32, 3), np.uint8))
    result = inspect(package, good_image(1), ignore_image=str(tmp_path / "mask.png")).result
    assert result.reasons == ("unfit_image",)
    assert "mask.png has 32x32 pixels, the frame 64x64" in (result.detail or "")


def test_a_frame_of_another_size_is_unknown(package: Package) -> None:
    assert inspect(package, good_image(1), frame=(64, 64)).result.verdict == "pass"
    result = inspect(package, good_image(1, 96), frame=(64, 64)).result
    assert (result.verdict, result.reasons) == ("unknown", ("wrong_size",))
    assert result.detail == "the frame has 96x96 pixels"


def test_what_is_ignored_is_dimmed_and_shows_no_heat() -> None:
    image = np.full((400, 400, 3), 200, np.uint8)
    ignored = np.zeros((400, 400), np.uint8)
    ignored[:, :200] = 255
    anomaly_map = np.zeros((8, 8), np.float32)
    picture = draw_overlay(image, anomaly_map, 1.0, ignored=ignored, label=False)
    assert (picture[:, :200] == int(200 * LIGHT_LEFT)).all()
    assert (picture[:, 200:] == 200).all()
    # Just below the threshold beside the mask: no line may be drawn around what does not reach it.
    anomaly_map[:, 4:] = 0.69
    np.testing.assert_array_equal(draw_overlay(image, anomaly_map, 1.0, ignored=ignored, label=False), picture)


def test_the_whole_command_with_a_view(package_file: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write_image(tmp_path / "parts" / "bad.png", bad_image(3))
    config = tmp_path / "line.toml"
    arguments = ["inspect", "--model", str(package_file), "--source", str(tmp_path / "parts"), "--json"]
    arguments += ["--config", str(config), "--images", str(tmp_path / "rejects")]

    def verdict(toml: str) -> str:
        config.write_text(toml)
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        return str(msgspec.json.decode(result.stdout)["verdict"])

    assert verdict("") == "fail"
    assert verdict("[roi]\nignore = [[0, 0, 64, 56]]\n") == "pass"
    assert verdict("[roi]\nignore = [[0, 48, 64, 16]]\n") == "fail"
    dimmed, plain = (read_image(path) for path in sorted((tmp_path / "rejects").glob("*.png"))[::-1])
    assert dimmed[-10:].mean() < 0.5 * plain[-10:].mean()
    with pytest.raises(ConfigError, match="leave nothing to judge"):
        verdict("[roi]\nframe = [64, 64]\nignore = [[0, 0, 64, 64]]\n")
