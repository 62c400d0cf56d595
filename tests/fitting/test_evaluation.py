"""The evaluation's definitions, on scores made up so that every figure is known."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from edgeflame.dataset import ImageRecord, open_dataset
from edgeflame.errors import DataError, NumericalError
from edgeflame.images import ImageU8, Preprocessing, read_mask, write_image
from edgeflame.tensors import F32
from edgeflame.threshold import ThresholdPromise
from fitting.evaluation import METRIC_NAMES, ScoredImages, compute_metrics, evaluate, score_test_images
from fitting.metrics import Resamples

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
    assert set(report.intervals) == {*METRIC_NAMES, *(f"macro_{name}" for name in METRIC_NAMES)}


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
    assert report.intervals == {}
    assert report.without_interval["image_AUROC"].startswith("not defined")
    assert report.defective_caught_interval is None
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


def scored_parts(tmp_path: Path, num_parts: int, seed: int) -> ScoredImages:
    """Parts with 1 to 4 good photographs, a third of them with some defective ones too, half of these with a mask."""
    rng = np.random.default_rng(seed)
    records, maps = [], []
    for part in range(num_parts):
        level = rng.normal()
        for photo in range(rng.integers(1, 5)):
            for label in ("good", "hole", "line")[: 1 + 2 * (part % 3 == 0)]:
                one = rng.gamma(2, 1, (8, 8)) + np.exp(0.3 * level)
                mask = None
                if label != "good":
                    y, x = rng.integers(0, 5, 2)
                    one[y : y + 3, x : x + 3] += rng.gamma(2, 1)
                    if part % 2:
                        mask = tmp_path / f"{part}-{photo}-{label}.png"
                        picture = np.zeros((64, 64), dtype=np.uint8)
                        picture[8 * y : 8 * y + 24, 8 * x : 8 * x + 24] = 255
                        write_image(mask, picture)
                maps.append(one.astype(np.float32))
                name = f"test/{label}/{part}-{photo}.png"
                records.append(ImageRecord(path=tmp_path / name, name=name, label=label, group=f"p{part}", mask=mask))
    stacked = np.stack(maps)
    return ScoredImages(records=records, scores=stacked.max(axis=(1, 2)), maps=stacked)


def test_intervals_are_those_of_evaluating_every_resample(tmp_path: Path) -> None:
    """The long way: each resample a test set of its own, with scikit-learn's figures and the fine bins."""
    scored = scored_parts(tmp_path, 24, seed=1)
    report = compute_metrics(scored, INPUT, threshold=8.0, groups_known=True, seed=3)
    assert (report.num_resamples, report.num_groups) == (1000, 24)
    parts = sorted({record.group for record in scored.records})
    values: dict[str, list[float]] = {}
    for drawn in Resamples(24, seed=3).drawn[:12].astype(int):
        indices = [
            index
            for part, times in zip(parts, drawn, strict=True)
            for index, record in enumerate(scored.records)
            if record.group == part
            for _ in range(times)
        ]
        again = ScoredImages(
            records=[scored.records[i] for i in indices], scores=scored.scores[indices], maps=scored.maps[indices]
        )
        one = compute_metrics(again, INPUT, threshold=8.0, groups_known=True, num_resamples=2)
        for name in report.intervals:
            values.setdefault(name, []).append(getattr(one, name))
        values.setdefault("hole", []).append(one.per_class["hole"].image_AUROC or 0.0)
    first = compute_metrics(scored, INPUT, threshold=8.0, groups_known=True, seed=3, num_resamples=12)
    for name, (low, high) in first.intervals.items():
        # Coarse bins cost pixel figures their last digits.
        tolerance = 1e-9 if "image" in name else 0.01
        np.testing.assert_allclose((low, high), np.quantile(values[name], [0.025, 0.975]), atol=tolerance, err_msg=name)
    hole = first.per_class["hole"].intervals["image_AUROC"]
    np.testing.assert_allclose(hole, np.quantile(values["hole"], [0.025, 0.975]), atol=1e-9)


def test_parts_that_stick_together_widen_the_interval(tmp_path: Path) -> None:
    scored = scored_parts(tmp_path, 24, seed=1)
    # The same photographs four times over: no new part, so no narrower interval.
    fourfold = ScoredImages(
        records=[*scored.records] * 4, scores=np.tile(scored.scores, 4), maps=np.tile(scored.maps, (4, 1, 1))
    )
    narrow = ScoredImages(
        records=[
            ImageRecord(path=one.path, name=one.name, label=one.label, group=str(index), mask=one.mask)
            for index, one in enumerate(fourfold.records)
        ],
        scores=fourfold.scores,
        maps=fourfold.maps,
    )
    once, four, alone = (
        compute_metrics(one, INPUT, threshold=8.0, groups_known=True, num_resamples=200).intervals["image_AUROC"]
        for one in (scored, fourfold, narrow)
    )
    assert four == pytest.approx(once, abs=1e-9)
    assert alone[1] - alone[0] < 0.85 * (once[1] - once[0])


def test_a_class_of_one_part_has_no_interval_and_says_so(folder: Path) -> None:
    groups = (folder / "groups.csv").read_text()
    groups += "".join(f"test/bright/{index}.png,only\n" for index in range(3))
    (folder / "groups.csv").write_text(groups)
    report = evaluate(darkness, open_dataset(folder), INPUT, threshold=200.0)
    bright = report.per_class["bright"]
    assert bright.num_groups == 1
    # The part is drawn in 63% of the resamples: an interval of its own spread, from those that have it.
    assert set(bright.intervals) == {"image_AUROC", "image_F1Max"}
    assert bright.without_interval["pixel_AUROC"] == "not defined: no image with a mask"
    assert bright.caught_interval == pytest.approx((0.0, 0.975))


def test_the_other_thresholds_are_applied_too(folder: Path) -> None:
    dataset = open_dataset(folder)
    promises = [
        ThresholdPromise(false_reject_rate=rate, value=value, expected_false_reject_rate=0.0)
        for rate, value in ((0.01, None), (0.05, 1e6), (0.2, 0.0))
    ]
    scored = score_test_images(darkness, dataset, INPUT)
    report = compute_metrics(scored, INPUT, threshold=200.0, groups_known=True, promises=promises)
    assert [(one.good_rejected, one.defective_caught) for one in report.promises] == [(0, 0), (6, 9)]
