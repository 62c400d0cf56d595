"""`edgeflame export` as a user calls it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from cli import cli
from edge.runtimes.load import open_runtime
from edgeflame.errors import DataError, NegativeAnswerError, PackageError, StorageError, UsageError
from edgeflame.package import Package
from tests.support.small_package import bad_image, good_image, write_images


def export(model: Path, target: Path) -> str:
    result = CliRunner().invoke(cli, ["export", "--model", str(model), "--onnx", str(target)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_file_scores_as_the_package_does_and_says_what_it_is(
    package_file: Path, package: Package, tmp_path: Path
) -> None:
    target = tmp_path / "model.onnx"
    output = export(package_file, target)
    assert "uint8 [N, 64, 64, 3], BGR" in output
    assert f"{package.manifest.threshold.value:.6g}" in output
    images = np.stack([good_image(5), bad_image(6)])
    session = onnxruntime.InferenceSession(target.read_bytes(), providers=["CPUExecutionProvider"])
    scores, maps = session.run(None, {"image": images})
    expected = open_runtime(package.model_onnx, device="cpu").score(images)
    np.testing.assert_array_equal(scores, expected.scores)
    np.testing.assert_array_equal(maps, expected.maps)
    metadata = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert metadata["edgeflame.package_sha256"] == package.sha256
    assert float(metadata["edgeflame.threshold"]) == package.manifest.threshold.value
    assert metadata["edgeflame.method"] == "none"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_damaged_package_leaves_the_old_file_alone(package_file: Path, tmp_path: Path) -> None:
    damaged, target = tmp_path / "damaged.edgeflame", tmp_path / "model.onnx"
    shutil.copy(package_file, damaged)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    target.write_bytes(b"the old one")
    with pytest.raises(PackageError):
        export(damaged, target)
    assert target.read_bytes() == b"the old one"


def test_a_folder_that_is_not_there(package_file: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        export(package_file, tmp_path / "no" / "model.onnx")


def test_int8_needs_good_images_and_is_refused_where_it_does_not_agree(
    package: Package, package_file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "model.onnx"
    command = ["export", "--model", str(package_file), "--onnx", str(target), "--precision", "int8"]
    with pytest.raises(UsageError, match="--calibration DIR"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    folder = write_images(tmp_path / "images", good=6, bad=1)
    # The small model measures spreads of a few grey levels, which eight bits cannot tell: nothing may be written.
    with pytest.raises(NegativeAnswerError, match=r"int8 allows 15\.00%"):
        CliRunner().invoke(cli, [*command, "--calibration", str(folder / "good")], catch_exceptions=False)
    (folder / "hole").rename(folder / "good" / "defects")
    for path in (folder / "good").glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="these are not: defects"):
        CliRunner().invoke(cli, [*command, "--calibration", str(folder / "good")], catch_exceptions=False)
    assert not target.exists()
