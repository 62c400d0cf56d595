"""Drift: ranks, the detector's promise, and what is said of a line that changes and of one that does not."""

from __future__ import annotations

import datetime as dt
import math

import cv2
import msgspec
import numpy as np
import pytest
from scipy.special import ndtr

from edge.config.inspection import DriftConfig
from edge.drift.monitor import HIGHER, LOWER, Detector, DriftMonitor, Ranks, SavedMonitor
from edge.status import DriftCondition
from edgeflame.config import parse_config
from edgeflame.drift_reference import (
    CAMERA_STREAMS,
    NUM_QUANTILES,
    STREAMS,
    AlignmentTemplate,
    DriftReference,
    StreamReference,
    decode_drift_reference,
    encode_drift_reference,
    image_streams,
    make_drift_reference,
    make_stream_reference,
    part_streams,
)
from edgeflame.errors import ConfigError, DataError, PackageError
from tests.support.small_package import good_image

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.timezone.utc)
QUICK = DriftConfig(parts_per_year=20_000, alike=1)


def normal_reference(count: int = 5000, streams: tuple[str, ...] = STREAMS) -> DriftReference:
    """Every stream about 100, give or take 10."""
    values = np.random.default_rng(0).normal(100, 10, count)
    return DriftReference(streams={name: make_stream_reference(values) for name in streams})


def parts(count: int, seed: int = 1, **shifted: float) -> list[dict[str, float]]:
    """Parts of the reference; of the named streams shifted by so many standard deviations."""
    noise = np.random.default_rng(seed).normal(size=(count, len(STREAMS)))
    return [
        {name: 100 + 10 * (row[place] + shifted.get(name, 0.0)) for place, name in enumerate(STREAMS)} for row in noise
    ]


def feed(monitor: DriftMonitor, values: list[dict[str, float]]) -> list[tuple[int, str, str]]:
    """Which part changed which stream to what."""
    return [
        (index, change.stream, change.after.value)
        for index, one in enumerate(values)
        for change in monitor.observe(one, NOW + dt.timedelta(seconds=index))
    ]


class TestRanks:
    """Where a value lies among good parts."""

    def test_ranks_of_the_reference_itself_are_even(self) -> None:
        values = np.random.default_rng(3).lognormal(size=4000)
        ranks = Ranks("score", make_stream_reference(values))
        told = np.array([ranks.rank(value) for value in values])
        assert abs(told.mean() - 0.5) < 0.005
        assert abs(np.quantile(told, 0.25) - 0.25) < 0.02
        assert ranks.rank(-1e9) == 0.0
        assert ranks.rank(math.inf) == 1.0

    def test_without_any_spread_what_does_not_matter_is_in_the_middle(self) -> None:
        ranks = Ranks("brightness", make_stream_reference(np.full(50, 128.0)))
        assert [ranks.rank(value) for value in (120, 127, 128, 129, 140)] == [0, 0.5, 0.5, 0.5, 1]

    def test_a_value_that_most_parts_have_is_in_its_middle(self) -> None:
        ranks = Ranks("brightness", make_stream_reference(np.repeat([0.0, 50.0, 100.0], [10, 80, 10])))
        assert ranks.rank(50.0) == pytest.approx(0.5, abs=0.06)

    def test_fewer_witnesses_leave_more_doubt(self) -> None:
        assert Ranks("score", make_stream_reference(np.arange(1, 101.0))).doubt == pytest.approx(0.0673, abs=1e-3)
        assert Ranks("score", make_stream_reference(np.arange(1, 101.0), count=25)).doubt == pytest.approx(
            0.1345, abs=1e-3
        )


class TestDetector:
    """The promise: on average no more often than so."""

    @pytest.mark.parametrize(("inflation", "alike"), [(0.0, 1.0), (0.6, 4.0)])
    def test_the_mean_run_length_to_a_false_alarm_keeps_its_bound(self, inflation: float, alike: float) -> None:
        """At the edge of what is tolerated, with independent parts, and with an AR(1) of variance inflation 4."""
        num_lines, bound, rng = 3000, 200.0, np.random.default_rng(0)
        detector = Detector(np.full(num_lines, 0.1), tolerance=0.1, alike=alike, ceiling=1e9)
        first = np.full(num_lines, np.inf)
        # A normal value shifted by so much has the mean rank 1/2 + 0.1 exactly; correlated parts are in the middle,
        # as their mean given the part before wanders by itself.
        shift = 0.3583 if inflation == 0.0 else 0.0
        value = rng.standard_normal(num_lines)
        for step in range(1, 2001):
            value = inflation * value + math.sqrt(1 - inflation**2) * rng.standard_normal(num_lines)
            detector.update(ndtr(value + shift))
            first = np.minimum(first, np.where(detector.evidence()[:, HIGHER] >= bound, step, np.inf))
        # Cut off at 2000 parts: the mean can only be larger.
        assert np.minimum(first, 2000).mean() >= bound

    def test_a_change_is_found_soon_in_its_direction_only(self) -> None:
        detector = Detector(np.full(2, 0.1), tolerance=0.1, alike=1, ceiling=1e12)
        rng = np.random.default_rng(1)
        for _ in range(150):
            detector.update(np.array([ndtr(1.5 + rng.standard_normal()), ndtr(-1.5 + rng.standard_normal())]))
        evidence = detector.evidence()
        assert evidence[0, HIGHER] > 1e6
        assert evidence[1, LOWER] > 1e6
        assert evidence[0, LOWER] < 10
        assert evidence[1, HIGHER] < 10

    def test_no_part_takes_the_whole_stake_and_what_is_not_told_changes_nothing(self) -> None:
        detector = Detector(np.array([0.4, 0.1]), tolerance=0.1, alike=1, ceiling=1e12)
        for _ in range(1000):
            detector.update(np.array([0.0, np.nan]))
        evidence = detector.evidence()
        assert 0 < evidence[0, HIGHER] < 10
        assert (evidence[1] == 0).all()


class TestMonitor:
    """What is said."""

    def test_a_line_that_does_not_change_is_not_spoken_of(self) -> None:
        monitor = DriftMonitor(QUICK, normal_reference())
        assert feed(monitor, parts(3000)) == []
        status = monitor.status()
        assert (status.condition, status.message) == (
            DriftCondition.OK,
            "parts, camera and light are as they were learnt",
        )
        assert all(abs((one.rank or 0) - 0.5) < 0.1 for one in status.streams)

    def test_what_is_off_without_being_sure_is_not_called_as_learnt(self) -> None:
        monitor = DriftMonitor(QUICK, normal_reference())
        feed(monitor, parts(100, brightness=-0.45))
        status = monitor.status()
        off = [one.name for one in status.streams if one.is_off]
        assert (status.condition, "brightness" in off) == (DriftCondition.OK, True)
        assert status.message.startswith("no change is sure yet; the last parts: ")
        assert "brightness lower" in status.message

    def test_darker_pictures_are_the_camera_and_other_parts_are_not(self) -> None:
        monitor = DriftMonitor(QUICK, normal_reference())
        changes = feed(monitor, parts(400, brightness=-1.5, score=1.0))
        assert [change[1:] for change in changes if change[1] == "brightness"] == [
            ("brightness", "warning"),
            ("brightness", "alarm"),
        ]
        status = monitor.status()
        assert (status.camera, status.parts) == (DriftCondition.ALARM, DriftCondition.ALARM)
        assert status.message == (
            "the picture changed (camera, light, or quite other parts): brightness lower; score higher"
        )
        others = DriftMonitor(QUICK, normal_reference())
        feed(others, parts(400, embedding=1.5))
        status = others.status()
        assert (status.camera, status.parts) == (DriftCondition.OK, DriftCondition.ALARM)
        assert status.message == "the parts changed, camera and light did not: embedding higher"

    def test_scores_below_the_packages_are_no_alarm_but_below_the_lines_own_are(self) -> None:
        lower = parts(600, score=-1.5, embedding=-1.5)
        monitor = DriftMonitor(QUICK, normal_reference())
        assert feed(monitor, lower) == []
        assert not any(one.is_off for one in monitor.status().streams)
        own = DriftMonitor(msgspec.structs.replace(QUICK, learn=300, reference="line"))
        feed(own, parts(300, seed=11))
        feed(own, lower)
        assert own.status().message == "the parts changed, camera and light did not: score lower, embedding lower"

    def test_an_alarm_stays_until_it_is_cleared_and_says_when_it_is_over(self) -> None:
        monitor = DriftMonitor(QUICK, normal_reference())
        feed(monitor, parts(400, noise=2.0))
        since = next(one.since for one in monitor.status().streams if one.name == "noise")
        feed(monitor, parts(2000, seed=2))
        status = monitor.status()
        assert status.camera is DriftCondition.ALARM
        assert status.message == "camera or light changed: noise higher, by now back"
        assert next(one.since for one in status.streams if one.name == "noise") == since
        monitor.clear()
        assert monitor.status().condition is DriftCondition.OK
        assert feed(monitor, parts(1000, seed=3)) == []

    def test_a_warning_goes_by_itself(self) -> None:
        monitor = DriftMonitor(QUICK, normal_reference())
        values = parts(2000, seed=4, colour=1.0)
        until = next(index for index, one in enumerate(values) if monitor.observe(one, NOW))
        assert monitor.status().camera is DriftCondition.WARNING
        assert monitor.status().message == "perhaps: camera or light changed: colour higher"
        assert until < 400
        assert feed(monitor, parts(2000, seed=5))[-1][1:] == ("colour", "ok")

    def test_a_line_without_a_reference_learns_its_own(self) -> None:
        config = msgspec.structs.replace(QUICK, learn=300)
        monitor = DriftMonitor(config, normal_reference(streams=("score", "embedding")))
        learning = feed(monitor, [{name: one[name] * 2 for name in CAMERA_STREAMS} for one in parts(299)])
        assert learning == []
        assert monitor.status().message == "learning what this line looks like (299 of 300 parts)"
        assert monitor.status().parts is DriftCondition.OK
        learnt = feed(monitor, [{name: one[name] * 2 for name in CAMERA_STREAMS} for one in parts(1)])
        assert {change[2] for change in learnt} == {"ok"}
        assert len(learnt) == len(CAMERA_STREAMS)
        assert feed(monitor, [{name: one[name] * 2 for name in CAMERA_STREAMS} for one in parts(500, seed=6)]) == []
        # What was right for the package's camera is not for this one.
        feed(monitor, [{"brightness": one["brightness"]} for one in parts(300, seed=7)])
        assert monitor.status().camera is DriftCondition.ALARM

    def test_relearning_takes_the_line_as_it_is(self) -> None:
        config = msgspec.structs.replace(QUICK, learn=300)
        monitor = DriftMonitor(config, normal_reference())
        feed(monitor, parts(300, brightness=3.0))
        monitor.relearn()
        assert monitor.status().condition is DriftCondition.LEARNING
        feed(monitor, parts(300, seed=8, brightness=3.0))
        assert feed(monitor, parts(1000, seed=9, brightness=3.0)) == []
        assert monitor.status().condition is DriftCondition.OK

    def test_a_restart_changes_nothing(self) -> None:
        config = msgspec.structs.replace(QUICK, learn=200)
        values = [*parts(250), *parts(350, seed=10, sharpness=-1.0)]
        for reference in (normal_reference(), None):
            straight, broken = DriftMonitor(config, reference), DriftMonitor(config, reference)
            told = feed(straight, values)
            again = []
            for index, one in enumerate(values):
                again += [(index, *rest) for _, *rest in feed(broken, [one])]
                if index % 37 == 0:
                    saved = msgspec.json.decode(msgspec.json.encode(broken.saved()), type=SavedMonitor)
                    broken = DriftMonitor(config, reference, saved)
            assert [tuple(change) for change in again] == told
            assert any(change[1:] == ("sharpness", "alarm") for change in told)
            assert broken.status().message == straight.status().message

    def test_a_reference_of_few_parts_is_not_relied_on(self) -> None:
        assert DriftMonitor(QUICK, normal_reference(29)).status().condition is DriftCondition.LEARNING
        assert DriftMonitor(QUICK, normal_reference(30)).status().condition is DriftCondition.OK

    def test_asked_to_it_trusts_the_line_alone(self) -> None:
        monitor = DriftMonitor(msgspec.structs.replace(QUICK, reference="line"), normal_reference())
        assert monitor.status().condition is DriftCondition.LEARNING

    def test_a_wild_part_is_one_part_and_a_missing_value_none(self) -> None:
        monitor = DriftMonitor(QUICK, normal_reference())
        for one in parts(200):
            monitor.observe({**one, "score": 1e30}, NOW) if one["score"] > 125 else monitor.observe(one, NOW)
        monitor.observe({"score": math.nan}, NOW)
        monitor.observe({}, NOW)
        assert monitor.status().condition is DriftCondition.OK


@pytest.mark.parametrize(
    "keys",
    [
        {"false_alarms_per_year": 0},
        {"parts_per_year": 5},
        {"tolerance": 0.5},
        {"alike": 0.5},
        {"learn": 3},
        {"max_per_s": 0},
        {"false_alarms_per_year": 1e6},
    ],
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="drift"):
        parse_config(b"", DriftConfig, "drift", keys)


class TestCondition:
    """What a picture and a part are told by."""

    def test_each_change_of_a_picture_moves_its_own_stream(self) -> None:
        image = cv2.GaussianBlur(good_image(0, 256), (0, 0), 1.2)
        cv2.circle(image, (100, 150), 40, (40, 60, 50), -1)
        template = AlignmentTemplate([image])
        before = image_streams(image, template)
        noise = np.random.default_rng(1).normal(0, 6, image.shape)
        changes = {
            "brightness": (image * 0.8).astype(np.uint8),
            "colour": np.clip(image + np.array([12, 0, -12]), 0, 255).astype(np.uint8),
            "sharpness": cv2.GaussianBlur(image, (0, 0), 2.5),
            "noise": np.clip(image + noise, 0, 255).astype(np.uint8),
            "contrast": np.clip((image.astype(float) - 120) * 1.3 + 120, 0, 255).astype(np.uint8),
        }
        for name, changed in changes.items():
            after = image_streams(changed, template)
            assert abs(after[name] - before[name]) > 0.15 * abs(before[name]) + 0.5, name
        moved = image_streams(np.roll(image, (12, -20), axis=(0, 1)), template)
        assert moved["shift_x"] - before["shift_x"] == pytest.approx(-100 * 20 / 256, abs=0.8)
        assert moved["shift_y"] - before["shift_y"] == pytest.approx(100 * 12 / 256, abs=0.8)
        assert set(before) == set(CAMERA_STREAMS)

    def test_the_noise_stream_measures_noise(self) -> None:
        flat = np.full((256, 256, 3), 120.0)
        for sigma in (2.0, 5.0):
            noisy = np.clip(flat + np.random.default_rng(0).normal(0, sigma, (256, 256, 1)), 0, 255).astype(np.uint8)
            assert math.exp(image_streams(noisy, None)["noise"]) == pytest.approx(sigma, rel=0.05)

    def test_a_black_picture_and_a_broken_map_have_finite_streams_or_none(self) -> None:
        black = np.zeros((64, 64, 3), np.uint8)
        assert all(map(math.isfinite, image_streams(black, None).values()))
        assert part_streams(None, np.full((2, 2), np.nan, np.float32)) == {}
        assert part_streams(2.0, np.array([[1.0, 3.0]], np.float32)) == {"score": 2.0, "embedding": 2.0}

    def test_photographs_of_one_part_are_one_witness(self) -> None:
        images = [image_streams(good_image(seed), None) for seed in range(20)]
        found = make_drift_reference({"score": np.arange(40.0)}, images, num_parts=10, num_images=40)
        assert found.streams["score"].count == 10
        assert found.streams["brightness"].count == 5
        assert decode_drift_reference(encode_drift_reference(found)) == found

    def test_what_is_no_reference_is_refused(self) -> None:
        good = [float(step) for step in range(NUM_QUANTILES)]
        for quantiles, count in ((good[1:], 5), (good[::-1], 5), ([*good[:-1], math.inf], 5), (good, 0)):
            with pytest.raises(PackageError, match="quantiles"):
                StreamReference(quantiles=tuple(quantiles), count=count)
        for data in (b"", b"\xff", b"{}", b'{"streams": {"score": {"quantiles": [1], "count": 4}}}'):
            with pytest.raises(PackageError):
                decode_drift_reference(data)
        with pytest.raises(DataError):
            make_stream_reference(np.array([np.nan]))
