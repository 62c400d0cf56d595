"""Defective images among the good ones: found, shown, and left out where asked for, never silently."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeflame.config import load_config
from edgeflame.dataset import open_dataset
from edgeflame.errors import ConfigError, DataError
from edgeflame.images import write_image
from edgeflame.methods import Learning
from edgeflame.package import read_package
from fitting.suspects import HighestMaps, worst_indices
from fitting.threshold import set_threshold
from tests.support.commands import edgeflame
from tests.support.part_images import part_image
from trainer.fit import fit


@pytest.fixture(scope="module")
def soiled(parts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good parts, and one part whose two photographs both show the same hole."""
    root = tmp_path_factory.mktemp("soiled") / "data"
    shutil.copytree(parts_folder, root)
    with (root / "groups.csv").open("a") as groups:
        for index in range(2):
            image = part_image(500 + index)
            image[10:30, 20:40] //= 6
            write_image(root / f"train/good/bad-{index}.png", image)
            groups.write(f"train/good/bad-{index}.png,bad\n")
    return root


BAD = ["train/good/bad-0.png", "train/good/bad-1.png"]


def test_mixed_in_defects_are_the_first_suspects(soiled: Path, small_learning: Learning) -> None:
    """Though both photographs of the part show the hole: its statistics never saw the part."""
    site = fit(open_dataset(soiled), small_learning).site
    assert sorted(one.record.name for one in site.suspects[:2]) == BAD
    assert [one.score for one in site.suspects] == sorted((one.score for one in site.suspects), reverse=True)
    assert len(site.suspects) == 26
    for one in site.suspects:
        assert one.anomaly_map.max() == pytest.approx(one.score)
        assert not one.left_out
    assert site.threshold.num_left_out == 0
    assert [entry["file"] for entry in site.details["least_normal"][:2]] == [
        one.record.name for one in site.suspects[:2]
    ]
    assert "left_out" not in site.details


@pytest.mark.parametrize("mode", ["expected", "promise"])
def test_a_part_that_moves_the_threshold_by_itself_is_named(
    soiled: Path,
    parts_folder: Path,
    small_learning: Learning,
    mode: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    learning = msgspec.structs.replace(
        small_learning, calibration=msgspec.structs.replace(small_learning.calibration, mode=mode)
    )
    with caplog.at_level(logging.WARNING, logger="edgeflame"):
        site = fit(open_dataset(soiled), learning).site
    (part,) = site.influential
    assert sorted(site.images.records[index].name for index in part.images) == BAD
    others = [index for index in range(len(site.images)) if index not in part.images]
    groups = [site.images.groups[index] for index in others]
    assert (
        part.without
        == set_threshold(site.held_out_scores[others], groups, learning.calibration, groups_known=True).value
    )
    assert part.without < 0.8 * site.threshold.value
    (told,) = site.details["influential_parts"]
    assert (sorted(told["files"]), told["threshold_without"]) == (BAD, part.without)
    record = next(record for record in caplog.records if record.getMessage() == "part_moves_threshold")
    assert record.__dict__["fields"]["without_it"] == part.without
    clean = fit(open_dataset(parts_folder), learning).site
    assert (clean.influential, clean.details["influential_parts"]) == ((), [])


def test_what_is_left_out_leaves_no_trace_but_its_name(
    soiled: Path, parts_folder: Path, small_learning: Learning, caplog: pytest.LogCaptureFixture
) -> None:
    learning = msgspec.structs.replace(
        small_learning, scoring=msgspec.structs.replace(small_learning.scoring, drop_worst=2 / 26)
    )
    with caplog.at_level(logging.WARNING, logger="edgeflame"):
        dropped = fit(open_dataset(soiled), learning)
    clean = fit(open_dataset(parts_folder), small_learning)
    np.testing.assert_array_equal(dropped.site.statistics.mean, clean.site.statistics.mean)
    np.testing.assert_allclose(dropped.site.held_out_scores, clean.site.held_out_scores, rtol=1e-6)
    assert dropped.site.threshold.value == pytest.approx(clean.site.threshold.value)
    np.testing.assert_array_equal(dropped.references, clean.references)
    # Never silently: in the log, in the package, in the promise's caveat.
    record = next(record for record in caplog.records if record.getMessage() == "images_left_out")
    assert record.__dict__["fields"]["count"] == 2
    provenance = dropped.provenance()
    assert sorted(provenance["statistics"]["left_out"]) == BAD
    assert (provenance["num_images"], dropped.report.num_read) == (24, 26)
    assert dropped.site.threshold.num_left_out == 2
    assert "2 images were left out" in " ".join(dropped.site.threshold.caveats())
    assert [one.left_out for one in dropped.site.suspects[:3]] == [True, True, False]


def test_the_command_names_them_and_shows_them(
    soiled: Path, fitted_package: Path, settings_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.edgeflame"
    arguments = ["fit", "--data", soiled, "--out", out, "--config", settings_file, "--backbone-from", fitted_package]
    result = edgeflame(*arguments, "--drop-worst", 0.08, "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("least normal"))
    assert all(f"{name} (" in line for name in BAD)
    assert line.count("left out") == 2
    assert "2 images were left out as suspects; had they all been good" in result.output
    manifest = read_package(out).manifest
    assert manifest.learning.scoring.drop_worst == 0.08
    assert sorted(manifest.provenance["statistics"]["left_out"]) == BAD
    page = (tmp_path / "report/index.html").read_text()
    assert page.count("<figure>") == 24
    assert page.index("bad-") < page.index("train/good/0")
    assert page.count(", left out") == 2
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_the_command_and_its_page_say_what_the_threshold_would_be_without(
    soiled: Path, parts_folder: Path, fitted_package: Path, settings_file: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "m.edgeflame", tmp_path / "report"
    options = ["--out", out, "--config", settings_file, "--report", report, "--backbone-from", fitted_package]
    result = edgeflame("fit", "--data", soiled, *options)
    assert result.exit_code == 0, result.output
    (told,) = read_package(out).manifest.provenance["statistics"]["influential_parts"]
    without = f"{told['threshold_without']:.4g}"
    line = f"without {told['files'][0]} and the others of its part it would be {without}"
    assert f"One part moves the threshold of the good parts: {line} (" in result.stdout
    page = (report / "index.html").read_text()
    assert line in page
    assert page.count(f"without its part the threshold would be {without}") == 2
    result = edgeflame("fit", "--data", parts_folder, *options)
    assert result.exit_code == 0, result.output
    assert "moves the threshold" not in result.output + (report / "index.html").read_text()


def test_no_more_can_be_left_out_than_leaves_something(soiled: Path, small_learning: Learning, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="drop_worst"):
        load_config(None, Learning, {"scoring": {"drop_worst": 0.6}})
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((soiled / "train/good").iterdir())[:5]:
        shutil.copy(path, few)
    learning = msgspec.structs.replace(
        small_learning, scoring=msgspec.structs.replace(small_learning.scoring, drop_worst=0.5)
    )
    with pytest.raises(DataError, match=r"at least 4 .* got 3"):
        fit(open_dataset(few), learning)


def test_a_share_above_none_is_at_least_one_image() -> None:
    scores = np.array([3.0, 1.0, 5.0, 5.0])
    assert worst_indices(scores, 0.0) == []
    assert worst_indices(scores, 0.01) == [2]
    assert worst_indices(scores, 0.5) == [2, 3]


def test_only_the_highest_maps_are_kept() -> None:
    rng = np.random.default_rng(0)
    scores, maps = rng.normal(size=60), rng.normal(size=(60, 2, 2)).astype(np.float32)
    highest = HighestMaps(7)
    for start in range(0, 60, 8):
        batch = list(range(start, min(60, start + 8)))
        highest.add(batch, scores[batch], maps[batch])
    kept = highest.by_index()
    assert list(kept) == np.argsort(-scores)[:7].tolist()
    for index, one in kept.items():
        np.testing.assert_array_equal(one, maps[index])
