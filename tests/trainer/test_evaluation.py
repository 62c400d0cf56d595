"""The evaluation's definitions, on scores made up so that every figure is known."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from edgeflame.dataset import open_dataset
from edgeflame.errors import DataError, NumericalError
from edgeflame.images import ImageU8, Preprocessing, read_mask, write_image
from trainer.evaluation import F32, evaluate

INPUT = Preprocessing(height=64, width=64)


def darkness(batch: ImageU8) -> tuple[F32, F32]:
    """A detector that sees darkness: maps of 8 x 8 cells, the score their maximum."""
    cells = 255 - batch.astype(np.float32).mean(axis=3).reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4))
    return cells.max(axis=(1, 2)), cells


@pytest.fixture
def folder(parts_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil, with a second defect class that is not dark at all."""
    root = tmp_path / "data"
    shutil.copytree(parts_folder, root)
    (root / "test/bright").mkdir()
    for index in range(3):
        write_image(root / f"test/bright/{index}.png", np.full((64, 64, 3), 250, dtype=np.uint8))
    return root


def test_every_figure_follows_its_definition(folder: Path) -> None:
    dataset = open_dataset(folder)
    report = evaluate(darkness, dataset, INPUT, threshold=200.0)
    assert (report.num_images, report.num_good, report.num_defective) == (15, 6, 9)
    hole, bright = report.per_class["hole"], report.per_class["bright"]
    assert (hole.num_images, hole.num_with_mask, hole.image_AUROC) == (6, 6, 1.0)
    assert (bright.image_AUROC, bright.pixel_AUROC, bright.pixel_AUPRO) == (0.0, None, None)
    assert report.macro_image_AUROC == pytest.approx(0.5)
    assert report.image_AUROC == pytest.approx(6 / 9)
    # A class without masks has no pixel figure and does not count in the mean.
    assert report.macro_pixel_AUROC == hole.pixel_AUROC
    assert report.image_F1Max == pytest.approx(0.8)
    assert (report.good_passed, report.good_rejected) == (6, 0)
    assert (report.defective_caught, report.defective_missed) == (6, 3)
    assert (hole.caught, bright.caught) == (6, 0)
    assert report.groups_known
    assert report.image_AUROC_interval is not None


def test_pixel_figures_are_scikit_learns_over_every_pixel(folder: Path) -> None:
    dataset = open_dataset(folder)
    report = evaluate(darkness, dataset, INPUT, threshold=200.0)
    values, labels, own = [], [], []
    for record in dataset.test:
        if record.label == "bright":
            continue  # it has no mask, so nobody knows which of its pixels are defective
        _, maps = darkness(cv2.imread(str(record.path))[None])
        values.append(cv2.resize(maps[0], (64, 64), interpolation=cv2.INTER_LINEAR).ravel())
        truth = read_mask(record.mask) > 0 if record.mask else np.zeros((64, 64), dtype=bool)
        labels.append(truth.ravel())
        own.append(record.label == "hole")
    everything = roc_auc_score(np.concatenate(labels), np.concatenate(values))
    of_class = roc_auc_score(
        np.concatenate([one for one, mine in zip(labels, own, strict=True) if mine]),
        np.concatenate([one for one, mine in zip(values, own, strict=True) if mine]),
    )
    assert report.pixel_AUROC == pytest.approx(everything, abs=1e-3)
    assert report.per_class["hole"].pixel_AUROC == pytest.approx(of_class, abs=1e-3)


def test_without_masks_pixel_figures_are_null(folder: Path) -> None:
    shutil.rmtree(folder / "ground_truth")
    report = evaluate(darkness, open_dataset(folder), INPUT, threshold=200.0)
    document = msgspec.json.decode(msgspec.json.encode(report))
    assert document["image_AUROC"] > 0
    for name in ("pixel_AUROC", "macro_pixel_AUROC", "pixel_AUPRO"):
        assert document[name] is None
    assert document["per_class"]["hole"]["pixel_AUROC"] is None


def test_without_defects_there_are_verdicts_but_no_auroc(folder: Path) -> None:
    shutil.rmtree(folder / "test/hole")
    shutil.rmtree(folder / "test/bright")
    report = evaluate(darkness, open_dataset(folder), INPUT, threshold=0.0)
    assert report.image_AUROC is None
    assert report.macro_image_AUROC is None
    assert report.image_AUROC_interval is None
    assert report.per_class == {}
    assert report.good_rejected == 6


def test_a_plain_folder_has_nothing_to_evaluate(folder: Path) -> None:
    with pytest.raises(DataError, match="no test images"):
        evaluate(darkness, open_dataset(folder / "train/good"), INPUT, threshold=1.0)


def test_unreadable_test_images_are_counted_or_refused(folder: Path) -> None:
    (folder / "test/good/0.png").write_bytes(b"not an image")
    report = evaluate(darkness, open_dataset(folder), INPUT, threshold=200.0)
    assert (report.num_unreadable, report.num_good) == (1, 5)
    with pytest.raises(DataError, match=r"0\.png"):
        evaluate(darkness, open_dataset(folder), INPUT, threshold=200.0, on_unreadable="refuse")


def test_a_score_that_is_no_number_is_a_fault(folder: Path) -> None:
    def broken(batch: ImageU8) -> tuple[F32, F32]:
        scores, maps = darkness(batch)
        scores[-1] = np.nan
        return scores, maps

    with pytest.raises(NumericalError, match="no finite score"):
        evaluate(broken, open_dataset(folder), INPUT, threshold=200.0)
