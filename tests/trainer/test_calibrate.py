"""Setting a package's threshold again: from new images only, shown first, and not for the worse."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cv2
import msgspec
import pytest

from edgeflame.images import read_image, write_image
from edgeflame.package import read_package
from tests.support.commands import edgeflame, error_of
from tests.support.part_images import part_image


@pytest.fixture
def new_parts(tmp_path: Path) -> Path:
    """Good images that the package was not fitted on."""
    folder = tmp_path / "new"
    folder.mkdir()
    for index in range(8):
        write_image(folder / f"{index}.png", part_image(5000 + index))
    return folder


def test_calibrate_sets_the_threshold_from_images_not_seen(
    fitted_package: Path, parts_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "calibrated.edgeflame"
    arguments = ("calibrate", "--model", fitted_package, "--data", parts_folder, "--out", out)
    result = edgeflame(*arguments, "--mode", "promise", "--false-reject-rate", 0.4, "--confidence", 0.9)
    assert result.exit_code == 0, result.output
    before, after = read_package(fitted_package), read_package(out)
    threshold = after.manifest.threshold
    assert (threshold.num_images, threshold.num_groups) == (6, 6)  # test/good
    assert (threshold.false_reject_rate, threshold.confidence) == (0.4, 0.9)
    assert threshold.value != before.manifest.threshold.value
    assert after.model_onnx == before.model_onnx
    assert after.manifest.provenance["calibrated"]["previous_threshold"] == before.manifest.threshold.value


def test_calibrate_shows_what_each_promise_costs_and_catches(
    fitted_package: Path, parts_folder: Path, tmp_path: Path
) -> None:
    arguments = ("calibrate", "--model", fitted_package, "--data", parts_folder, "--out", tmp_path / "c.edgeflame")
    result = edgeflame(*arguments, "--unit", "part", "--mode", "promise")
    assert result.exit_code == 0, result.output
    assert "good parts rejected" in result.output
    assert "5.00% was asked for; that takes more parts than there are" in result.output
    assert "defective caught" in result.output
    assert "too few parts" in result.output
    document = msgspec.json.decode(edgeflame(*arguments, "--json").stdout)
    assert document["threshold"]["unit"] == "photograph"
    assert document["threshold"]["value"] == read_package(tmp_path / "c.edgeflame").manifest.threshold.value
    # A plain folder of good images does as well, and shows no defects.
    plain = edgeflame(*arguments[:4], parts_folder / "test/good", *arguments[5:])
    assert "defective caught" not in plain.output
    assert "6 images, each taken for a part of its own" in plain.output


def test_a_part_that_moves_the_threshold_by_itself_is_named(fitted_package: Path, new_parts: Path) -> None:
    arguments = ("calibrate", "--model", fitted_package, "--data", new_parts)
    clean = edgeflame(*arguments)
    assert clean.exit_code == 0, clean.output
    assert "moves the threshold" not in clean.output
    write_image(new_parts / "odd.png", part_image(6000, hole=True))
    odd = edgeflame(*arguments)
    assert odd.exit_code == 0, odd.output
    # Of eight parts as of nine it is the highest score: without the odd one it is what it was before.
    value = f"{msgspec.json.decode(edgeflame(*arguments, '--json').stdout)['threshold']['value']:.4g}"
    words = re.search(r"One part moves .*: without (\S+) it would be ([\d.]+) \(", odd.output)
    assert words is not None, odd.output
    assert f"threshold {value}" in odd.output
    assert words[1] == "odd.png"
    assert f"threshold {words[2]}:" in clean.output


def test_calibrate_takes_the_highest_f1_where_defects_are_labelled(
    fitted_package: Path, parts_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "f1.edgeflame"
    arguments = ("calibrate", "--model", fitted_package, "--out", out, "--max-f1", "--data")
    result = edgeflame(*arguments, parts_folder)
    assert result.exit_code == 0, result.output
    assert "highest F1" in result.output
    threshold = read_package(out).manifest.threshold
    assert threshold.chosen_by == "f1"
    report = msgspec.json.decode(edgeflame("evaluate", "--model", out, "--data", parts_folder, "--json").stdout)
    caught, rejected = report["defective_caught"], report["good_rejected"]
    assert 2 * caught / (2 * caught + rejected + report["defective_missed"]) == pytest.approx(report["image_F1Max"])
    # Six good parts can promise next to nothing, and it says so.
    assert threshold.false_reject_rate > 0.39
    error = error_of(edgeflame(*arguments, parts_folder / "test/good"))
    assert (error.exit_code, "no defective images" in str(error)) == (3, True)


def test_calibrate_refuses_what_it_cannot_do(fitted_package: Path, parts_folder: Path, tmp_path: Path) -> None:
    before = fitted_package.read_bytes()
    (tmp_path / "data/test/hole").mkdir(parents=True)
    shutil.copy(parts_folder / "test/hole/0.png", tmp_path / "data/test/hole")
    for more, exit_code, message in (
        (("--data", tmp_path / "data"), 3, "no good images to calibrate with"),
        (("--data", parts_folder, "--confidence", "1"), 5, "confidence must be in (0, 1)"),
        (("--data", parts_folder, "--out", tmp_path / "no/x.edgeflame"), 2, "no such folder"),
    ):
        error = error_of(edgeflame("calibrate", "--model", fitted_package, *more))
        assert (error.exit_code, message in str(error)) == (exit_code, True), str(error)
    assert fitted_package.read_bytes() == before


def test_nothing_is_written_unless_asked_for(fitted_package: Path, new_parts: Path) -> None:
    before = fitted_package.read_bytes()
    result = edgeflame("calibrate", "--model", fitted_package, "--data", new_parts)
    assert result.exit_code == 0, result.output
    assert "nothing was written" in result.stderr
    shown = read_package(fitted_package).manifest.threshold
    assert f"threshold {shown.value:.4g}" in result.output
    assert "good rejected of these images: " in result.output
    assert result.output.count("threshold ") > 2
    document = msgspec.json.decode(
        edgeflame("calibrate", "--model", fitted_package, "--data", new_parts, "--json").stdout
    )
    assert document["package"] is None
    assert document["previous"]["value"] == document["previous_threshold"] == shown.value
    assert fitted_package.read_bytes() == before


def test_before_and_after_on_the_same_images(fitted_package: Path, parts_folder: Path) -> None:
    result = edgeflame("calibrate", "--model", fitted_package, "--data", parts_folder, "--false-reject-rate", 0.5)
    assert result.exit_code == 0, result.output
    assert "good rejected of these images: 0 of 6 (0.0%) before" in result.output
    assert "defective caught of these images: " in result.output


def test_a_worse_promise_replaces_no_better_one_in_silence(
    fitted_package: Path, new_parts: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copy(fitted_package, tmp_path / "mine.edgeflame"))
    held = mine.read_bytes()
    arguments = ("calibrate", "--model", mine, "--data", new_parts)
    error = error_of(edgeflame(*arguments, "--in-place"))
    assert (error.exit_code, "nothing was written" in str(error)) == (1, True)
    assert "from 8 images" in str(error)
    # Neither by its own name, nor in the place of another package.
    copy = Path(shutil.copy(mine, tmp_path / "copy.edgeflame"))
    for out in (mine, copy):
        assert "promises at most" in str(error_of(edgeflame(*arguments, "--out", out)))
    assert mine.read_bytes() == copy.read_bytes() == held
    kept = edgeflame(*arguments, "--out", tmp_path / "other.edgeflame")
    assert kept.exit_code == 0, kept.output
    accepted = edgeflame(*arguments, "--in-place", "--accept-worse")
    assert accepted.exit_code == 0, accepted.output
    assert "promises at most" in accepted.stderr
    assert read_package(mine).manifest.threshold.num_groups == 8
    # What is no worse than before needs no word.
    again = edgeflame(*arguments, "--in-place")
    assert again.exit_code == 0, again.output


def test_another_wish_from_as_many_parts_is_not_worse(fitted_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(13):
        write_image(folder / f"{index}.png", part_image(6000 + index))
    mine = Path(shutil.copy(fitted_package, tmp_path / "mine.edgeflame"))
    asked = edgeflame("calibrate", "--model", mine, "--data", folder, "--in-place", "--false-reject-rate", 0.5)
    assert asked.exit_code == 0, asked.output
    assert read_package(mine).manifest.learning.calibration.false_reject_rate == 0.5


def test_images_that_the_model_was_fitted_on_are_recognised(
    fitted_package: Path, parts_folder: Path, new_parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.edgeflame"
    arguments = ("calibrate", "--model", fitted_package, "--out", out, "--data")
    error = error_of(edgeflame(*arguments, parts_folder / "train" / "good"))
    assert (error.exit_code, "24 of 24 images" in str(error)) == (3, True)
    # A copy under another name, in another format, among new ones.
    cv2.imwrite(str(new_parts / "copy.bmp"), read_image(parts_folder / "train/good/03.png"))
    error = error_of(edgeflame(*arguments, new_parts))
    assert f"1 of 9 images, such as {new_parts / 'copy.bmp'}, are among those the model was fitted on" in str(error)
    assert not out.exists()
    allowed = edgeflame(*arguments, new_parts, "--allow-fitted")
    assert allowed.exit_code == 0, allowed.output
    assert "too low" in allowed.stderr
    # What was fitted stays known, however often the threshold is set anew.
    assert read_package(out).fitted == read_package(fitted_package).fitted
    assert len(read_package(out).fitted) == 24


def test_two_places_to_write_to(fitted_package: Path, new_parts: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", "--model", fitted_package, "--data", new_parts, "--in-place", "--out")
    error = error_of(edgeflame(*arguments, tmp_path / "x.edgeflame"))
    assert (error.exit_code, "exclude each other" in str(error)) == (2, True)


def test_labelled_defects_move_the_threshold_and_nothing_else(
    fitted_package: Path, settings_file: Path, parts_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "d.edgeflame"
    fit = ("fit", "--data", parts_folder, "--out", out, "--config", settings_file, "--product", "plate")
    result = edgeflame(*fit, "--defects", parts_folder, "--cost-of-miss", 2, "--false-reject-rate", 0.5)
    assert result.exit_code == 0, result.output
    assert "of the least expected cost that good parts allow" in result.output
    assert "of 6 labelled defective parts (6 images) it misses" in result.output
    assert "defective caught" in result.output
    weighed, plain = read_package(out), read_package(fitted_package)
    threshold = weighed.manifest.threshold
    assert threshold.chosen_by == "cost"
    assert threshold.labelled is not None
    assert threshold.labelled.cost_of_miss == 2
    assert weighed.model_onnx == plain.model_onnx
    assert weighed.manifest.num_images == plain.manifest.num_images
    assert weighed.condition == plain.condition
    assert weighed.fitted == plain.fitted
    assert threshold.value >= edgeflame_threshold(*fit, "--false-reject-rate", 0.5, out=out)


def edgeflame_threshold(*fit: object, out: Path) -> float:
    """The threshold that a command has written."""
    result = edgeflame(*fit)
    assert result.exit_code == 0, result.output
    return read_package(out).manifest.threshold.value


def test_labelled_defects_at_calibration(
    fitted_package: Path, parts_folder: Path, new_parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.edgeflame"
    arguments = ("calibrate", "--model", fitted_package, "--data", new_parts, "--out", out)
    result = edgeflame(*arguments, "--defects", parts_folder / "test" / "hole", "--cost-of-miss", 3)
    assert result.exit_code == 0, result.output
    after = read_package(out).manifest
    assert after.threshold.labelled is not None
    assert after.threshold.labelled.num_images == 6
    assert after.threshold.num_images == 8
    assert after.provenance["calibrated"]["num_defective"] == 6
    alone = edgeflame(*arguments, "--json")
    assert after.threshold.value >= msgspec.json.decode(alone.stdout)["threshold"]["value"]


def test_a_defect_that_was_learnt_as_good_is_refused(
    fitted_package: Path, settings_file: Path, parts_folder: Path, new_parts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "defects"
    folder.mkdir()
    shutil.copy(parts_folder / "train/good/07.png", folder / "stain.png")
    out = tmp_path / "x.edgeflame"
    fit = ("fit", "--data", parts_folder, "--out", out, "--config", settings_file)
    error = error_of(edgeflame(*fit, "--defects", folder))
    assert (error.exit_code, "are labelled as defects, and are among the good training images" in str(error)) == (
        3,
        True,
    )
    calibrate = ("calibrate", "--model", fitted_package, "--data", new_parts, "--out", out, "--defects", folder)
    assert "are among those the model was fitted on" in str(error_of(edgeflame(*calibrate)))
    assert not out.exists()
    error = error_of(edgeflame(*fit, "--cost-of-miss", 5))
    assert (error.exit_code, "needs labelled defects" in str(error)) == (2, True)
