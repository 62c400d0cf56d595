"""Fitting from a folder to a package, and what happens to bad folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from boards.dataset import BoardStream
from edgeflame.config import load_config
from edgeflame.dataset import open_dataset
from edgeflame.drift_reference import STREAMS
from edgeflame.errors import DataError, EdgeFlameError, UsageError
from edgeflame.images import Preprocessing, read_image, write_image
from edgeflame.methods import Learning
from edgeflame.package import read_package
from fitting.imageset import ImageSet
from tests.support.commands import edgeflame, error_of
from tests.support.paths import REPOSITORY
from trainer.fit import fit


@pytest.fixture
def folder(parts_folder: Path, tmp_path: Path) -> Path:
    root = tmp_path / "data"
    shutil.copytree(parts_folder, root)
    return root


def test_a_fitted_package_says_what_it_is(fitted_package: Path) -> None:
    manifest = read_package(fitted_package).manifest
    assert manifest.product == "plate"
    assert (manifest.num_images, manifest.rank, manifest.weights.source) == (24, 6, "random")
    assert manifest.threshold.num_groups == 12
    assert manifest.threshold.groups_known
    assert manifest.provenance["kind"] == "fit"
    assert manifest.provenance["num_unreadable"] == 0


def test_the_package_knows_what_good_parts_are_like(fitted_package: Path, parts_folder: Path, tmp_path: Path) -> None:
    package = read_package(fitted_package)
    assert package.condition is not None
    streams = package.condition.streams
    assert set(streams) == set(STREAMS)
    details = package.manifest.provenance["statistics"]
    assert streams["score"].quantiles[-1] == pytest.approx(details["held_out_score_max"], rel=1e-6)
    assert streams["embedding"].quantiles[-1] < streams["score"].quantiles[-1]
    # Photographs of one part are one witness.
    assert all(stream.count <= package.manifest.threshold.num_groups for stream in streams.values())
    out = tmp_path / "calibrated.edgeflame"
    edgeflame("calibrate", "--model", fitted_package, "--data", parts_folder, "--out", out)
    # The threshold is now about other images, and so is what drift is measured against.
    calibrated = read_package(out).condition
    assert calibrated is not None
    assert set(calibrated.streams) == set(STREAMS)
    assert calibrated.streams["brightness"] != streams["brightness"]
    assert all(
        stream.count <= read_package(out).manifest.threshold.num_groups for stream in calibrated.streams.values()
    )


def test_evaluate_runs_the_packages_own_graph(fitted_package: Path, parts_folder: Path) -> None:
    result = edgeflame("evaluate", "--model", fitted_package, "--data", parts_folder, "--json")
    assert result.exit_code == 0, result.output
    report = msgspec.json.decode(result.stdout)
    assert report["image_AUROC"] > 0.8
    assert report["per_class"]["hole"]["num_images"] == 6
    assert report["threshold"] == read_package(fitted_package).manifest.threshold.value
    table = edgeflame("evaluate", "--model", fitted_package, "--data", parts_folder)
    assert table.exit_code == 0
    assert "hole" in table.output
    assert "image AUROC" in table.output


def test_the_graph_scores_as_the_trainer_does(fitted_package: Path, parts_folder: Path) -> None:
    from edge.runtimes.load import open_runtime
    from fitting.crossfit import image_scores, score_maps
    from fitting.fit import read_training_images
    from trainer.device import rgb_tensor
    from trainer.embedding import embed
    from trainer.model import build_model

    torch = pytest.importorskip("torch")
    package = read_package(fitted_package)
    learning = package.manifest.learning
    images = read_training_images(open_dataset(parts_folder), learning).batch(range(8))
    model, _ = build_model(learning)
    embeddings = embed(model.backbone, rgb_tensor(images, torch.device("cpu")))
    maps = score_maps(package.statistics, embeddings, learning.scoring)
    result = open_runtime(package.model_onnx, device="cpu").score(images)
    np.testing.assert_allclose(result.maps, maps, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(result.scores, image_scores(maps), rtol=1e-3)


def test_fade_trains_the_backbone(parts_folder: Path, settings_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "fade.edgeflame"
    result = edgeflame(
        "fit", "--data", parts_folder, "--out", out, "--config", settings_file, "--method", "fade", "--rank", "auto"
    )
    assert result.exit_code == 0, result.output
    provenance = read_package(out).manifest.provenance
    assert len(provenance["training"]["epochs"]) == 1
    assert set(provenance["statistics"]["log_volume_by_pooling_radius"]) == {"0", "1"}


def test_settings_on_the_command_line_win(parts_folder: Path, settings_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeflame"
    result = edgeflame(
        "fit", "--data", parts_folder, "--out", out, "--config", settings_file,
        "--rank", 2, "--size", 96, "--roi", "4,4,56,48", "--seed", 9, "--false-reject-rate", 0.3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    learning = read_package(out).manifest.learning
    assert (learning.scoring.rank, learning.input.width, learning.seed) == (2, 96, 9)
    assert learning.input.roi is not None
    assert learning.input.roi.height == 48
    assert learning.calibration.false_reject_rate == 0.3


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("--method", "magic"), 5, "unknown method 'magic'"),
        (("--method", "flame"), 2, "needs other sites"),
        (("--rank", "many"), 2, "--rank takes a number or auto"),
        (("--size", "100"), 5, "multiple of 32"),
        (("--roi", "1,2"), 5, "X,Y,WIDTH,HEIGHT"),
        (("--roi", "0,0,500,500"), 3, "outside"),
        (("--false-reject-rate", "2"), 5, "false_reject_rate"),
        (("--device", "quantum"), 2, "quantum"),
        (("--groups", "/no/such/file.csv"), 3, "groups file"),
    ],
)
def test_settings_that_make_no_sense(
    parts_folder: Path, settings_file: Path, tmp_path: Path, arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    out = tmp_path / "m.edgeflame"
    result = edgeflame("fit", "--data", parts_folder, "--out", out, "--config", settings_file, *arguments)
    error = error_of(result)
    assert error.exit_code == exit_code
    assert message in str(error)
    assert not out.exists()


def test_an_empty_folder_and_one_of_non_images(tmp_path: Path, settings_file: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    arguments = ("fit", "--data", folder, "--out", tmp_path / "m.edgeflame", "--config", settings_file)
    assert "no images found" in str(error_of(edgeflame(*arguments)))
    (folder / "notes.txt").write_text("hello")
    assert "no images found" in str(error_of(edgeflame(*arguments)))
    for index in range(6):
        (folder / f"{index}.png").write_text("hello")
    error = error_of(edgeflame(*arguments))
    assert "at least 4 readable good images" in str(error)
    assert "6 could not be read" in str(error)


def test_a_package_cannot_go_into_a_folder_that_is_not_there(parts_folder: Path, tmp_path: Path) -> None:
    error = error_of(edgeflame("fit", "--data", parts_folder, "--out", tmp_path / "no" / "m.edgeflame"))
    assert isinstance(error, UsageError)


def test_one_unreadable_image_is_skipped_and_counted_or_refused(folder: Path, small_learning: Learning) -> None:
    (folder / "train/good/07.png").write_bytes((folder / "train/good/07.png").read_bytes()[:200])
    fitted = fit(open_dataset(folder), small_learning)
    assert fitted.report.unreadable == ["train/good/07.png"]
    assert fitted.site.statistics.count == 23
    assert fitted.provenance()["num_unreadable"] == 1
    with pytest.raises(DataError, match=r"07\.png"):
        fit(open_dataset(folder), small_learning, on_unreadable="refuse")


def test_images_of_mixed_size_and_mode_are_taken(folder: Path, small_learning: Learning) -> None:
    good = folder / "train/good"
    for index, convert in enumerate(
        (
            lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2GRAY),
            lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2BGRA),
            lambda image: image.astype(np.uint16) * 257,
            lambda image: cv2.resize(image, (200, 90)),
        )
    ):
        path = good / f"{index:02}.png"
        cv2.imwrite(str(path), convert(cv2.imread(str(path))))
    fitted = fit(open_dataset(folder), small_learning)
    assert fitted.report.num_read == 24
    assert len(fitted.report.sizes) == 2


def test_too_few_images_and_too_few_parts(folder: Path, small_learning: Learning) -> None:
    (folder / "groups.csv").write_text(
        "path,part\n" + "".join(f"train/good/{index:02}.png,one\n" for index in range(24))
    )
    with pytest.raises(DataError, match="24 of 1"):
        fit(open_dataset(folder), small_learning)
    for path in sorted((folder / "train/good").iterdir())[3:]:
        path.unlink()
    with pytest.raises(DataError, match="got 3"):
        fit(open_dataset(folder), small_learning)


def test_the_same_images_again_and_again_are_refused(folder: Path, small_learning: Learning) -> None:
    first = (folder / "train/good/00.png").read_bytes()
    for path in (folder / "train/good").iterdir():
        path.write_bytes(first)
    with pytest.raises(EdgeFlameError, match="same picture"):
        fit(open_dataset(folder), small_learning)


def test_the_command_prints_an_error_in_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "edgeflame", "fit", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "m")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 3
    assert result.stderr.strip() == f"edgeflame: {tmp_path / 'no'}: no such folder"


def test_names_that_are_not_utf8_end_neither_fit_nor_what_follows(
    parts_folder: Path, settings_file: Path, fitted_package: Path, tmp_path: Path
) -> None:
    """As a process of its own, whose output is bytes."""
    data = Path(os.fsdecode(bytes(tmp_path) + b"/data-\xff"))
    shutil.copytree(parts_folder, data)
    for folder in ("train/good", "test/hole"):
        first = min((data / folder).iterdir())
        first.rename(first.with_name(os.fsdecode(b"part\xff\n.png")))
        (data / folder / os.fsdecode(b"broken\xfe.png")).write_bytes(b"no image")
    out, report = Path(os.fsdecode(bytes(tmp_path) + b"/m\xff.edgeflame")), tmp_path / "report"
    others = shutil.copy(fitted_package, os.fsdecode(bytes(tmp_path) + b"/others\xff.edgeflame"))

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "edgeflame", *map(os.fsencode, map(str, arguments))]
        done = subprocess.run(command, capture_output=True, check=False, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout.decode()

    said = run("fit", "--data", data, "--out", out, "--config", settings_file, "--prior", others, "--report", report)
    assert "1 unreadable skipped" in said
    provenance = read_package(out).manifest.provenance
    assert provenance["unreadable"] == ["train/good/broken\\xfe.png"]
    for source in (provenance["backbone"], provenance["statistics"]["prior"]):
        assert source["file"] == "others\\xff.edgeflame"
    assert "data-" in (report / "index.html").read_text()
    run("evaluate", "--model", out, "--data", data, "--json", "--report", tmp_path / "figures")
    lines = run("inspect", "--model", out, "--source", data / "test", "--json").splitlines()
    parts = {part["part_id"]: part for part in map(msgspec.json.decode, lines)}
    assert parts["hole/part\\xff\\x0a.png"]["verdict"] in ("pass", "fail")
    assert parts["hole/broken\\xfe.png"]["reasons"] == ["unreadable"]
    assert "broken\\xfe.png" in parts["hole/broken\\xfe.png"]["detail"]
    (data / "test" / "hole" / os.fsdecode(b"part\xff\n.png")).rename(data / os.fsdecode(b"one\xff.png"))
    assert "one\\xff.png" in run("inspect", "--model", out, "--source", data / os.fsdecode(b"one\xff.png"))


def test_pictures_of_other_formats_are_named_and_counted_as_unreadable(folder: Path, settings_file: Path) -> None:
    (folder / "train" / "good" / "a.gif").write_bytes(b"GIF89a" + bytes(100))
    settings = load_config(settings_file, Learning)
    fitted = fit(open_dataset(folder), settings)
    assert fitted.report.unreadable == ["train/good/a.gif"]
    with pytest.raises(DataError, match=r"a\.gif: .*GIF is not read"):
        fit(open_dataset(folder), settings, on_unreadable="refuse")


def test_frames_of_another_shape_than_the_model_was_made_of_are_unknown(
    fitted_package: Path, parts_folder: Path, tmp_path: Path
) -> None:
    """A film strip and a stamp, squeezed into the model's input, must not pass unsaid."""
    photo = read_image(parts_folder / "test" / "good" / "0.png")
    folder = tmp_path / "in"
    folder.mkdir()
    height, width = photo.shape[:2]
    for name, size in {
        "same": (width, height),
        "stamp": (width // 2, height // 2),
        "strip": (width * 3, height),
    }.items():
        write_image(folder / f"{name}.png", cv2.resize(photo, size))

    def inspect(settings: str) -> dict[str, dict[str, object]]:
        config = tmp_path / "line.toml"
        config.write_text(settings)
        result = edgeflame("inspect", "--model", fitted_package, "--source", folder, "--json", "--config", config)
        assert result.exit_code == 0, result.output
        return {part["part_id"]: part for part in map(msgspec.json.decode, result.stdout.splitlines())}

    parts = inspect("")
    assert parts["same.png"]["verdict"] != "unknown"
    for name, size in (("stamp.png", f"{width // 2}x{height // 2}"), ("strip.png", f"{width * 3}x{height}")):
        assert (parts[name]["verdict"], parts[name]["reasons"]) == ("unknown", ["wrong_size"])
        made_of = f"the frame has {size} pixels, the model was made of {width}x{height} (image_quality.frame_size)"
        assert parts[name]["detail"] == made_of
    for settings in ('[image_quality]\nframe_size = "any"\n', f"[roi]\ncrop = [0, 0, {width // 2}, {height // 2}]\n"):
        assert all("wrong_size" not in part["reasons"] for part in inspect(settings).values())  # type: ignore[operator]
    # What a person has said counts.
    stated = inspect(f"[roi]\nframe = [{width // 2}, {height // 2}]\n")
    assert [stated[f"{name}.png"]["reasons"] == ["wrong_size"] for name in ("same", "stamp")] == [True, False]


def test_figures_of_images_of_another_shape_are_told_of(fitted_package: Path, folder: Path) -> None:
    arguments = ("evaluate", "--model", fitted_package, "--data", folder, "--json")
    assert "images_of_another_size" not in edgeflame(*arguments).stderr
    for file in (folder / "test" / "good").iterdir():
        write_image(file, cv2.resize(read_image(file), None, fx=2, fy=1))
    assert "images_of_another_size count=6" in edgeflame(*arguments).stderr


def test_fit_says_which_images_a_line_would_not_judge(
    folder: Path, settings_file: Path, fitted_package: Path, tmp_path: Path
) -> None:
    good = folder / "train" / "good"
    shape = read_image(good / "00.png").shape
    write_image(good / "03.png", np.zeros(shape, np.uint8))
    write_image(good / "04.png", np.full(shape, 255, np.uint8))
    out = tmp_path / "m.edgeflame"
    result = edgeflame(
        "fit", "--data", folder, "--out", out, "--config", settings_file, "--backbone-from", fitted_package
    )
    assert result.exit_code == 0, result.output
    named = "train/good/03.png (too_dark, blank), train/good/04.png (too_bright, blank)"
    assert f"2 that a line would not judge, take them out: {named}" in result.stdout
    assert "images_a_line_would_not_judge count=2 of=24" in result.stderr
    unfit = read_package(out).manifest.provenance["unfit"]
    assert unfit == {"train/good/03.png": ["too_dark", "blank"], "train/good/04.png": ["too_bright", "blank"]}
    # And the line does not judge them.
    lines = edgeflame("inspect", "--model", out, "--source", good, "--json").stdout.splitlines()
    unknown = {
        part["part_id"]: part["reasons"] for part in map(msgspec.json.decode, lines) if part["verdict"] == "unknown"
    }
    assert unknown == {"03.png": ["too_dark", "blank"], "04.png": ["too_bright", "blank"]}


def test_photographs_without_the_colours_of_the_others_are_named(tmp_path: Path) -> None:
    boards = list(BoardStream(texture="warm_wood", seed=0, defect_rate=0.0, num_parts=8, image_size=128))
    # Of the eight, 0, 2, 5 and 7 are what the others are compared with.
    for index, board in enumerate(boards):
        image = board.image_bgr
        if index == 3:
            image = np.repeat(image[..., :1], 3, axis=2)
        if index == 4:
            image = image[..., ::-1].copy()
        write_image(tmp_path / f"{index}.png", image)
    report = ImageSet(open_dataset(tmp_path).train, Preprocessing(height=64, width=64)).report
    assert report.unfit == {"3.png": ("colour_lost",), "4.png": ("colour_swapped",)}


def test_parts_told_by_their_looks_are_written_down_to_be_corrected(
    parts_folder: Path, settings_file: Path, fitted_package: Path, tmp_path: Path
) -> None:
    data, out, groups = tmp_path / "plain", tmp_path / "m.edgeflame", tmp_path / "m.groups.csv"
    shutil.copytree(parts_folder / "train/good", data)
    arguments = ("fit", "--data", data, "--out", out, "--config", settings_file, "--backbone-from", fitted_package)
    first = edgeflame(*arguments)
    assert first.exit_code == 0, first.output
    assert str(groups) in first.output
    threshold = read_package(out).manifest.threshold
    rows = [line.split(",") for line in groups.read_text().splitlines()]
    assert rows[0] == ["path", "group"]
    assert (len(rows) - 1, len({row[1] for row in rows[1:]})) == (24, threshold.num_groups)
    assert not threshold.groups_known
    # What a person corrected is not written over, and is what counts once it is named.
    corrected = "path,group\n" + "".join(f"{row[0]},{int(row[0][:2]) // 3}\n" for row in rows[1:])
    groups.write_text(corrected)
    assert "left as it is" in edgeflame(*arguments).output
    assert groups.read_text() == corrected
    assert edgeflame(*arguments, "--groups", groups).exit_code == 0
    threshold = read_package(out).manifest.threshold
    assert (threshold.groups_known, threshold.num_groups) == (True, 8)
