"""A head that sites learn together, on images whose defects are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from edgeflame.errors import FederationError, StorageError
from fitting.defect_head import HeadFit
from fitting.head_training import MEMBERS, UNITS, Coordinates, HeadImages
from fitting.shared_head import (
    DEFAULT_WEIGHT,
    SharedHead,
    initial_head,
    judge,
    judging,
    judging_both,
    read_head,
    train_round,
    write_head,
)
from tests.fitting.test_defect_head import CHANNELS, GRID, auroc, make, score

NO_MARKS = make(0, kind=0)


def site(number: int) -> HeadImages:
    """Good images of a site whose pictures are brighter than others', and vary more."""
    good = make(60, seed=10 + number)
    return HeadImages(
        cells=((1 + 0.3 * number) * good.cells.astype(np.float32) + number).astype(np.float16),
        distances=good.distances,
        scores=good.scores,
        groups=good.groups,
    )


def seen_by(number: int, images: HeadImages) -> HeadImages:
    """Images as the camera of a site sees them."""
    return replace(images, cells=((1 + 0.3 * number) * images.cells.astype(np.float32) + number).astype(np.float16))


def learn(sites: Sequence[HeadImages], marks: Sequence[HeadImages], rounds: int = 3) -> SharedHead:
    head = initial_head(CHANNELS, space="a" * 64, seed=0)
    for _ in range(rounds):
        trained = [
            train_round(head, Coordinates(good, symmetric=True), good, bad, seed=0)[0]
            for good, bad in zip(sites, marks, strict=True)
        ]
        parameters = np.mean([one.parameters for one in trained], axis=0, dtype=np.float32)
        head = replace(head, parameters=parameters, marked=float(np.mean([one.marked for one in trained])))
    return head


def judged(
    head: SharedHead, good: HeadImages, bad: HeadImages = NO_MARKS, coordinates: Coordinates | None = None
) -> HeadFit:
    return judge(head, coordinates or Coordinates(good, symmetric=True), good, bad, grid=GRID, rate=0.05, seed=0)


@pytest.fixture(scope="module")
def sites() -> list[HeadImages]:
    return [site(number) for number in range(3)]


@pytest.fixture(scope="module")
def head(sites: list[HeadImages]) -> SharedHead:
    """Two kinds are marked, each at a site of its own; the third site has none."""
    marks = [seen_by(kind, make(20, kind=kind, seed=30 + kind)) for kind in (0, 1)]
    return learn(sites, [*marks, NO_MARKS])


@pytest.mark.parametrize("kind", [0, 1])
def test_what_was_marked_at_another_site_is_told_better(head: SharedHead, sites: list[HeadImages], kind: int) -> None:
    fitted = judged(head, sites[2])
    assert fitted.head is not None, fitted.details
    assert (fitted.details["weight"], fitted.details["weight_chosen_by"]) == (DEFAULT_WEIGHT, "default")
    good, bad = seen_by(2, make(80, seed=4)), seen_by(2, make(40, kind=kind, seed=5 + kind))
    assert auroc(score(fitted, good), score(fitted, bad)) > auroc(good.scores, bad.scores) + 0.05
    # The threshold that held-out scores give holds for good parts that nobody saw.
    assert (score(fitted, good) > np.quantile(fitted.good_scores, 0.9)).mean() < 0.25


def test_own_marks_choose_the_weight(head: SharedHead, sites: list[HeadImages]) -> None:
    fitted = judged(head, sites[0], seen_by(0, make(20, kind=0, seed=30)))
    assert fitted.details["weight_chosen_by"] == "own marks"
    assert fitted.details["num_judging_bad"] == 5
    assert fitted.head is not None


def test_a_head_that_calls_all_bad_does_not_count(head: SharedHead, sites: list[HeadImages]) -> None:
    parameters = head.parameters.copy()
    parameters[-MEMBERS:] += 100.0
    fitted = judged(replace(head, parameters=parameters), sites[2])
    assert fitted.head is None
    assert fitted.details["no_head"] == "it calls 100% of this site's good images bad"
    assert (fitted.good_scores == sites[2].scores).all()


def test_a_head_that_raises_some_good_parts_beyond_the_threshold_does_not_count(
    head: SharedHead, sites: list[HeadImages]
) -> None:
    good = replace(sites[2], scores=np.exp(np.random.default_rng(0).normal(0, 0.3, 60)))
    held = np.flatnonzero(judging(good.groups, 0))
    good.scores[held] = 1.4
    cells = good.cells.copy()
    # Good parts that nobody learnt from look like what was marked.
    cells[held[:6], 40:46, 0] += 8.0
    fitted = judged(head, replace(good, cells=cells), coordinates=Coordinates(good, symmetric=True))
    assert fitted.head is None
    assert "good images that judge would be rejected" in fitted.details["no_head"]


def test_a_site_of_few_good_parts_has_no_head(head: SharedHead, sites: list[HeadImages]) -> None:
    """Two photographs of each part; of eight parts two judge, which is too few to see how many it would reject."""
    groups = [f"part-{index // 2}" for index in range(60)]
    twelve, eight = (replace(sites[2].subset(np.arange(2 * count)), groups=groups[: 2 * count]) for count in (12, 8))
    assert judged(head, twelve).details["weight"] > 0
    few = judged(head, eight)
    assert few.head is None
    assert few.details["no_head"] == "8 good parts are too few: a quarter judges it, at least 3"
    np.testing.assert_array_equal(few.good_scores, eight.scores)


def test_a_head_that_says_nothing_does_not_count(head: SharedHead, sites: list[HeadImages]) -> None:
    fitted = judged(replace(head, parameters=np.zeros_like(head.parameters)), sites[2])
    assert fitted.details["no_head"] == "it says the same of every image"


def test_without_marks_anywhere_there_is_no_head(sites: list[HeadImages]) -> None:
    nothing = learn(sites, [NO_MARKS] * 3, rounds=1)
    assert nothing.marked == 0
    assert judged(nothing, sites[0]).details["no_head"] == "nobody in the fleet has marked a bad part"


def test_a_head_that_tells_own_marks_worse_does_not_count(head: SharedHead, sites: list[HeadImages]) -> None:
    turned = head.parameters.copy()
    second = slice(-MEMBERS - UNITS, -MEMBERS)
    turned[second] *= -1
    bad = make(40, kind=0, seed=30)
    # All over, or the largest logits would be those of cells that no defect touches.
    cells = bad.cells.copy()
    cells[:, :, 0] += 8.0
    fitted = judged(replace(head, parameters=turned), sites[0], seen_by(0, replace(bad, cells=cells)))
    assert fitted.head is None
    assert fitted.details["no_head"] == "it tells this site's own held-out marks from good parts worse"
    assert all(one["gain"] < -0.2 for one in fitted.details["tried"])


def test_what_judges_is_not_learnt_from_and_a_part_is_never_on_both_sides() -> None:
    good = make(40, seed=1)
    bad = replace(make(12, kind=0, seed=2), groups=[*good.groups[:6], *(f"b{index}" for index in range(6))])
    of_good, of_bad = judging_both(good, bad, 0)
    assert of_good.sum() == 10
    for group, held in zip(bad.groups, of_bad, strict=True):
        if group in good.groups:
            assert held == of_good[good.groups.index(group)]
    coordinates = Coordinates(good, symmetric=True)
    spoilt = good.cells.copy()
    spoilt[of_good] = 9.0
    start = initial_head(CHANNELS, space="a" * 64, seed=0)
    one, two = (
        train_round(start, coordinates, images, bad, seed=0)[0] for images in (good, replace(good, cells=spoilt))
    )
    assert (one.parameters == two.parameters).all()


def test_the_same_round_gives_the_same_bytes(tmp_path: Path, sites: list[HeadImages]) -> None:
    start = initial_head(CHANNELS, space="a" * 64, seed=0)
    for name in ("one", "two"):
        trained, _ = train_round(start, Coordinates(sites[0], symmetric=True), sites[0], NO_MARKS, seed=0)
        write_head(tmp_path / name, trained)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = read_head(tmp_path / "one", num_channels=CHANNELS)
    assert (again.parameters == trained.parameters).all()
    assert (again.space, again.marked) == ("a" * 64, 0.0)


def test_a_file_that_is_no_such_head_is_refused(tmp_path: Path, head: SharedHead) -> None:
    path = tmp_path / "head"
    with pytest.raises(StorageError, match="cannot read"):
        read_head(path, num_channels=CHANNELS)
    write_head(path, head)
    with pytest.raises(FederationError, match="no head for embeddings of 11 channels"):
        read_head(path, num_channels=CHANNELS + 1)
    write_head(path, replace(head, parameters=np.full_like(head.parameters, np.nan)))
    with pytest.raises(FederationError, match="NaN"):
        read_head(path, num_channels=CHANNELS)
    path.write_bytes(safetensors.numpy.save({"weights": np.zeros((2, 2), np.float32)}))
    with pytest.raises(FederationError, match="no head"):
        read_head(path, num_channels=CHANNELS)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(FederationError, match="damaged"):
        read_head(path, num_channels=CHANNELS)
