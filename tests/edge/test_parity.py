"""The gate between a graph and the line: reference images score as the trained model scored them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from click.testing import CliRunner

from cli import cli
from edge.runtimes.interface import Scores
from edge.runtimes.load import compare_with_references, open_runtime, require_parity
from edgeflame.errors import NegativeAnswerError, PackageError
from edgeflame.images import ImageU8, Preprocessing
from edgeflame.package import (
    MAX_REFERENCES,
    MODEL_MEMBER,
    Package,
    ReferenceImage,
    evenly_spaced,
    make_references,
    read_package,
    reference_member,
    write_package,
)
from tests.support.small_package import GRID, SIZE, good_image, with_references, write_images


@pytest.fixture(scope="module")
def checked(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small package with three reference images."""
    return with_references(package, tmp_path_factory.mktemp("checked") / "m.edgeflame")


class Runtime:
    """The package's own answers, altered."""

    provider, precision, input_size, grid = "fake", "fp32", (SIZE, SIZE), (GRID, GRID)

    def __init__(self, package: Package, change: Any, change_unsmoothed: Any = lambda maps: maps) -> None:
        self._real, self._change = open_runtime(package.model_onnx, device="cpu"), change
        self._change_unsmoothed = change_unsmoothed

    def score(self, batch: ImageU8) -> Scores:
        found = self._real.score(batch)
        assert found.unsmoothed is not None
        return Scores(*self._change(found.scores, found.maps), unsmoothed=self._change_unsmoothed(found.unsmoothed))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_packages_own_graph_passes(checked: Path) -> None:
    package = read_package(checked)
    report = require_parity(open_runtime(package.model_onnx, device="cpu"), package)
    assert report.passed
    assert (report.num_images, report.flipped, report.precision) == (3, (), "fp32")
    assert report.worst is not None
    assert 0 <= report.worst < 1e-4
    image = package.references[1].image(package.manifest.learning.input)
    np.testing.assert_array_equal(image, good_image(1))  # as it went in


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores, maps: (scores * 1.006, maps), r"difference of 0\.6\d%; fp32 allows 0\.50%"),
        (lambda scores, maps: (scores, maps * 0.99), "difference of 1.00%"),
        # A map that is right in its maximum alone.
        (lambda scores, maps: (scores, np.where(maps < maps.max(), 0, maps)), "difference of"),
        (lambda scores, maps: (scores * np.nan, maps), "a score that is not finite"),
        (lambda scores, maps: (scores, maps * np.inf), "a score that is not finite"),
        (lambda scores, maps: (scores * 1e3, maps), "3 verdicts flip"),
    ],
)
def test_any_other_answer_is_refused(checked: Path, change: Any, message: str) -> None:
    package = read_package(checked)
    with pytest.raises(NegativeAnswerError, match=message):
        require_parity(Runtime(package, change), package)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: maps * 0.99, "difference of 1.00%"),
        (lambda maps: np.where(maps < maps.max(), 0, maps), "difference of"),
        (lambda maps: np.full_like(maps, maps.mean()), "difference of"),
        (lambda maps: maps * np.nan, "a score that is not finite"),
    ],
)
def test_any_other_map_before_smoothing_is_refused(checked: Path, change: Any, message: str) -> None:
    package = read_package(checked)
    with pytest.raises(NegativeAnswerError, match=message):
        require_parity(Runtime(package, lambda scores, maps: (scores, maps), change), package)


def test_a_package_of_an_older_version_has_no_map_before_smoothing_to_compare(checked: Path) -> None:
    package = read_package(checked)
    older = [
        dataclasses.replace(
            one, expected=msgspec.structs.replace(one.expected, unsmoothed_mean=None, unsmoothed_rms=None)
        )
        for one in package.references
    ]
    altered = Runtime(package, lambda scores, maps: (scores, maps), lambda maps: maps * 2)
    assert require_parity(altered, dataclasses.replace(package, references=tuple(older))).passed


def test_a_difference_within_the_tolerance_may_not_flip_a_verdict(checked: Path) -> None:
    package = read_package(checked)
    just_above = package.references[0].expected.score * 1.001
    threshold = msgspec.structs.replace(package.manifest.threshold, value=just_above)
    changed = dataclasses.replace(package, manifest=msgspec.structs.replace(package.manifest, threshold=threshold))
    report = compare_with_references(Runtime(package, lambda scores, maps: (scores * 1.002, maps)), changed)
    assert report.worst is not None
    assert report.worst < report.tolerance
    assert 0 in report.flipped
    assert not report.passed


def test_a_precision_that_does_not_exist_is_no_licence(checked: Path) -> None:
    package = read_package(checked)
    runtime = Runtime(package, lambda scores, maps: (scores, maps))
    runtime.precision = "fp1"
    with pytest.raises(PackageError, match="'fp1'; known are fp32, fp16, int8"):
        require_parity(runtime, package)


def other_graph(package: Package) -> bytes:
    """The same graph with the colours the wrong way round."""
    model = onnx.load_from_string(package.model_onnx)
    order = next(entry for entry in model.graph.initializer if entry.name == "edgeflame.rgb_order")
    order.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, 0], dtype=np.int64), order.name))
    data: bytes = model.SerializeToString()
    return data


def test_inspection_refuses_a_graph_that_fails(checked: Path, tmp_path: Path) -> None:
    package = read_package(checked)
    altered = tmp_path / "altered.edgeflame"
    write_package(
        altered,
        manifest=package.manifest,
        model_onnx=other_graph(package),
        statistics=package.statistics,
        references=package.references,
    )
    source = write_images(tmp_path / "photos")
    assert run("inspect", "--model", checked, "--source", source, "--json").exit_code == 0
    with pytest.raises(NegativeAnswerError, match="does not score the package's 3 reference images"):
        run("inspect", "--model", altered, "--source", source, "--json")


def test_old_packages_without_references_read_and_say_so(package_file: Path, package: Package) -> None:
    assert package.references == ()
    assert package.manifest.references == ()


@pytest.mark.parametrize("kind", ["size", "text", "cut"])
def test_a_reference_that_is_no_image_of_the_models_size(package: Package, checked: Path, kind: str) -> None:
    """One that claims to be huge is not even decoded."""
    (original, *_) = read_package(checked).references
    huge = original.png[:16] + (60_000).to_bytes(4, "big") * 2 + original.png[24:]
    png = {"size": huge, "text": b"hello", "cut": original.png[: len(original.png) // 2]}[kind]
    broken = dataclasses.replace(package, references=(ReferenceImage(png=png, expected=original.expected),))
    with pytest.raises(PackageError, match="reference image"):
        compare_with_references(Runtime(package, lambda scores, maps: (scores, maps)), broken)


def test_an_altered_or_missing_reference_is_noticed(checked: Path, tmp_path: Path) -> None:
    import zipfile

    name = reference_member(1)
    for change, message in ((None, f"{name} is missing"), (b"other", f"{name} was altered")):
        path = tmp_path / "m.edgeflame"
        with zipfile.ZipFile(checked) as old, zipfile.ZipFile(path, "w") as new:
            for member in old.namelist():
                data = old.read(member) if member != name else change
                if data is not None:
                    new.writestr(member, data)
        with pytest.raises(PackageError, match=message):
            read_package(path)


def test_too_many_references_are_refused(package: Package, tmp_path: Path) -> None:
    images = np.zeros((MAX_REFERENCES + 1, SIZE, SIZE, 3), np.uint8)
    references = make_references(images, np.ones((len(images), GRID, GRID)))
    with pytest.raises(PackageError, match=f"at most {MAX_REFERENCES}"):
        write_package(
            tmp_path / "m.edgeflame",
            manifest=package.manifest,
            model_onnx=package.model_onnx,
            statistics=package.statistics,
            references=references,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("total", "count", "expected"), [(10, 4, [0, 3, 6, 9]), (2, 4, [0, 1]), (5, 0, []), (0, 4, []), (9, 1, [0])]
)
def test_spread_over_the_set(total: int, count: int, expected: list[int]) -> None:
    assert list(evenly_spaced(total, count)) == expected


def test_png_is_lossless_and_keeps_the_order_of_colours() -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    (reference,) = make_references(image[None], np.ones((1, 2, 2)))
    np.testing.assert_array_equal(reference.image(Preprocessing(height=SIZE, width=SIZE)), image)
    assert cv2.imdecode(np.frombuffer(reference.png, np.uint8), cv2.IMREAD_COLOR)[0, 0].tolist() == image[0, 0].tolist()
    assert reference.expected == msgspec.convert({"score": 1, "map_max": 1, "map_mean": 1}, type(reference.expected))


def test_the_member_of_the_model_is_unchanged_by_references(checked: Path, package: Package) -> None:
    assert read_package(checked).manifest.sha256[MODEL_MEMBER] == package.manifest.sha256[MODEL_MEMBER]
