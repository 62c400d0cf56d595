"""One frame's way to its result: every fault ends in "unknown" with its reason."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from edge.config import InspectConfig, VerdictConfig
from edge.frame import Captured, make_frame
from edge.inspector import Inspector
from edge.result import Inspected, Result, json_line
from edge.runtimes.interface import Scores
from edge.runtimes.load import open_runtime
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, RuntimeUnavailableError
from edgeflame.images import ImageU8, Preprocessing, Region
from edgeflame.package import Package
from tests.support.inspection_results import judge
from tests.support.small_package import GRID, SIZE, bad_image, good_image


class FakeRuntime:
    """Answers what it is told to."""

    provider, precision, input_size, grid = "fake", "fp32", (SIZE, SIZE), (GRID, GRID)

    def __init__(self, score: float = 1.0, *, in_map: float | None = None, failure: Exception | None = None) -> None:
        self._scores = Scores(np.array([score], np.float32), np.zeros((1, GRID, GRID), np.float32))
        if in_map is not None:
            self._scores.maps[0, 2, 3] = in_map
        self._failure = failure

    def score(self, batch: ImageU8) -> Scores:
        if self._failure is not None:
            raise self._failure
        return self._scores


def inspect(
    inspector: Inspector, image: ImageU8 | None, *, error: str | None = None, label: str | None = None
) -> Inspected:
    frame = make_frame(part_id="p", source="s", image_bgr=image, error=error, label=label)
    return judge(inspector, Captured(sequence=7, frame=frame))


def test_good_passes_and_bad_fails_with_all_that_is_known(package: Package) -> None:
    inspector = Inspector(package, open_runtime(package.model_onnx, device="cpu"), InspectConfig())
    inspector.warm_up()
    good, bad = inspect(inspector, good_image(1, 200), label="good"), inspect(inspector, bad_image(2, 200))
    assert (good.result.verdict, good.result.reasons, good.result.is_right) == ("pass", (), True)
    assert (bad.result.verdict, bad.result.reasons, bad.result.is_right) == ("fail", ("above_threshold",), None)
    assert bad.result.threshold == package.manifest.threshold.value
    assert bad.result.model == package.sha256[:12]
    assert bad.result.sequence == 7
    assert bad.result.latency_ms > 0
    assert bad.image is not None
    assert bad.image.shape == (200, 200, 3)  # as the camera gave it
    assert bad.anomaly_map is not None
    assert bad.result.score == pytest.approx(float(bad.anomaly_map.max()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["score", "map"])
def test_nan_and_infinity_are_unknown_and_written_as_null(package: Package, value: float, where: str) -> None:
    runtime = FakeRuntime(value) if where == "score" else FakeRuntime(0.5, in_map=value)
    inspected = inspect(Inspector(package, runtime, InspectConfig()), good_image(1))
    assert inspected.result.verdict == "unknown"
    assert inspected.result.reasons == ("score_not_finite",)
    assert b'"score":null' in json_line(inspected.result)


def test_a_failing_runtime_is_unknown(package: Package) -> None:
    runtime = FakeRuntime(failure=RuntimeUnavailableError("out of memory"))
    result = inspect(Inspector(package, runtime, InspectConfig()), good_image(1)).result
    assert (result.verdict, result.reasons, result.detail) == ("unknown", ("runtime_failed",), "out of memory")


def test_no_image_is_unknown_with_the_sources_words(package: Package) -> None:
    result = inspect(Inspector(package, FakeRuntime(), InspectConfig()), None, error="cable").result
    assert (result.verdict, result.reasons, result.detail) == ("unknown", ("unreadable",), "cable")
    assert result.score is None


def test_an_image_smaller_than_the_region_is_unknown(package: Package) -> None:
    region = Preprocessing(height=SIZE, width=SIZE, roi=Region(x=50, y=0, width=100, height=100))
    manifest = msgspec.structs.replace(
        package.manifest, learning=msgspec.structs.replace(package.manifest.learning, input=region)
    )
    inspector = Inspector(dataclasses.replace(package, manifest=manifest), FakeRuntime(), InspectConfig())
    assert inspect(inspector, good_image(1, 200)).result.verdict == "pass"
    result = inspect(inspector, good_image(1, 120)).result
    assert (result.verdict, result.reasons) == ("unknown", ("unfit_image",))
    assert "reaches outside the 120x120 image" in (result.detail or "")


def test_a_dark_image_is_unknown_however_good_its_score(package: Package) -> None:
    result = inspect(Inspector(package, FakeRuntime(0.0), InspectConfig()), np.zeros((SIZE, SIZE, 3), np.uint8)).result
    assert (result.verdict, result.reasons) == ("unknown", ("too_dark", "blank"))


def test_the_configured_threshold_wins(package: Package) -> None:
    config = InspectConfig(verdict=VerdictConfig(threshold=0.5))
    result = inspect(Inspector(package, FakeRuntime(1.0), config), good_image(1)).result
    assert (result.verdict, result.threshold) == ("fail", 0.5)


@pytest.mark.parametrize("verdict", [{"threshold": 0.0}, {"threshold": float("nan")}, {"review_band": 1.0}])
def test_impossible_rules_are_refused(verdict: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        parse_config(b"", VerdictConfig, "verdict", verdict)


def test_a_result_reads_back(package: Package) -> None:
    result = inspect(Inspector(package, FakeRuntime(1.0), InspectConfig()), good_image(1)).result
    line = json_line(result)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line, type=Result) == result
    assert msgspec.json.decode(line)["captured"].endswith("Z")


def with_input(package: Package, **changed: object) -> Package:
    learning = package.manifest.learning
    manifest = msgspec.structs.replace(
        package.manifest,
        learning=msgspec.structs.replace(learning, input=msgspec.structs.replace(learning.input, **changed)),
    )
    return dataclasses.replace(package, manifest=manifest)


def test_a_mono12_image_is_judged_on_its_own_bits(package: Package) -> None:
    runtime = open_runtime(package.model_onnx, device="cpu")
    inspector = Inspector(with_input(package, bits=12), runtime, InspectConfig())
    for image, verdict in ((good_image(1), "pass"), (bad_image(2), "fail")):
        plain = inspect(inspector, image)
        deep = inspect(inspector, np.round(image * (4095 / 255)).astype(np.uint16))
        assert (plain.result.verdict, deep.result.verdict) == (verdict, verdict)
        assert deep.result.score == plain.result.score
        assert deep.image is not None
        # The evidence is what a person can see something in.
        np.testing.assert_array_equal(deep.image, image)
    full = inspect(inspector, good_image(1).astype(np.uint16) * 257)
    assert (full.result.verdict, full.result.reasons) == ("unknown", ("unfit_image",))
    assert "more than input.bits = 12 can hold" in (full.result.detail or "")


def test_a_line_says_when_samples_use_little_of_their_range(package: Package, caplog: pytest.LogCaptureFixture) -> None:
    runtime = open_runtime(package.model_onnx, device="cpu")
    inspector = Inspector(package, runtime, InspectConfig())
    for seed in range(2):
        inspect(inspector, good_image(seed).astype(np.uint16) * 16)
    assert "little_of_range_used" not in caplog.text
    for seed in range(5):
        inspect(inspector, good_image(seed).astype(np.uint16) * 16)
    assert caplog.text.count("little_of_range_used") == 1
