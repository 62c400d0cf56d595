"""What decides about models, as pure functions: disagreement, the ruling on a shadow run, the trial, the record."""

from __future__ import annotations

import uuid
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.config.outputs import ModelsConfig
from edge.models.rollout import LatencyBudget, check_acceptance
from edge.models.shadow import ALPHA, Canary, Comparison, RateTest, rank_correlation, wilson_upper
from edge.models.state import (
    ModelStateFile,
    ProductState,
    advance_candidate,
    begin_candidate,
    confirm_present,
    promote_candidate,
    roll_back_present,
)
from edge.result import Result
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, FederationError, StorageError
from edgeflame.mqtt.messages import BlobManifest, encode_message
from edgeflame.mqtt.release_messages import Disagreement, LineModels, Release, decode_line_models, decode_release

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
CONFIG = ModelsConfig(public_keys=("k",), max_disagreement=0.02)
NO_TIMES = LatencyBudget()


def result(verdict: str, score: float | None = 1.0, reasons: tuple[str, ...] = ()) -> Result:
    return Result(
        sequence=0,
        part_id="part",
        source="s",
        captured=NOW,
        verdict=verdict,
        reasons=reasons,
        detail=None,
        score=score,
        threshold=2.0,
        latency_ms=1.0,
        label=None,
        model="m",
    )


GOOD, BAD = result("pass", 1.0), result("fail", 3.0)
NAN = result("unknown", None, ("score_not_finite",))
FAILED = result("unknown", None, ("runtime_failed",))
DARK = result("unknown", None, ("too_dark",))


def test_what_differs_is_counted_by_kind() -> None:
    comparison = Comparison()
    for present, other in ((GOOD, GOOD), (GOOD, BAD), (BAD, GOOD), (BAD, BAD), (GOOD, NAN), (DARK, NAN), (DARK, DARK)):
        comparison.add(present, other)
    found = comparison.disagreement(skipped=7)
    assert (found.parts, found.differing, found.newly_failed, found.newly_passed) == (4, 2, 1, 1)
    assert (found.faults, found.skipped, found.share) == (1, 7, 0.5)


def test_correlation_is_that_of_the_ranks() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert rank_correlation(np.stack([x, np.exp(x / 10)], axis=1)) == pytest.approx(1.0)
    assert rank_correlation(np.stack([x, -x], axis=1)) == pytest.approx(-1.0)
    # With ties: 0.9486832980505138 by scipy.stats.spearmanr([1, 2, 3, 4], [1, 2, 2, 3]).
    tied = rank_correlation(np.array([[1, 1], [2, 2], [3, 2], [4, 3]], dtype=float))
    assert tied == pytest.approx(0.9486832980505138)
    assert rank_correlation(np.ones((5, 2))) is None
    assert rank_correlation(np.empty((0, 2))) is None


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_upper(81, 263) == pytest.approx(0.3662, abs=1e-4)
    assert wilson_upper(0, 20) == pytest.approx(0.1611, abs=1e-4)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (Disagreement(parts=200, differing=4), None),
        (Disagreement(parts=199, differing=4), "more"),
        (Disagreement(parts=30, differing=5), "disagreement"),
        (Disagreement(parts=30, faults=1), "faults"),
        (Disagreement(parts=0, slowdown=1.51), "too_slow"),
        (Disagreement(parts=200, slowdown=1.49), None),
    ],
)
def test_the_ruling_on_a_shadow_run(found: Disagreement, reason: str | None) -> None:
    ruling = check_acceptance(found, needed=200, config=CONFIG, times=NO_TIMES)
    if reason == "more":
        assert ruling is None
    else:
        assert ruling is not None
        assert (ruling.passed, ruling.reason or None) == (reason is None, reason)


def test_a_model_that_would_miss_the_deadline_is_too_slow() -> None:
    found = Disagreement(parts=200, slowdown=1.3)
    ruling = check_acceptance(found, needed=200, config=CONFIG, times=LatencyBudget(latency_ms=80, deadline_ms=100))
    assert ruling is not None
    assert ruling.reason == "too_slow"
    assert "104 ms" in ruling.detail
    ruling = check_acceptance(found, needed=200, config=CONFIG, times=LatencyBudget(latency_ms=70, deadline_ms=100))
    assert ruling is not None
    assert ruling.passed


def test_a_model_that_rejects_everything_is_found_out_at_once() -> None:
    trial = Canary(parts=2000, accepted=0.02, max_faults=3)
    assert trial.on_pair(BAD, GOOD) is None
    assert trial.on_pair(BAD, GOOD) is None
    alarm = trial.on_pair(BAD, GOOD)
    assert alarm is not None
    assert alarm.reason == "rejects_too_much"


def test_a_model_that_lets_defects_pass_is_found_out() -> None:
    trial = Canary(parts=2000, accepted=0.02, max_faults=3)
    alarms = [trial.on_pair(GOOD, BAD if number % 4 == 0 else GOOD) for number in range(60)]
    alarm = next(one for one in alarms if one is not None)
    assert alarm.reason == "rejects_too_little"


def test_a_bad_batch_is_not_blamed_on_the_model() -> None:
    trial = Canary(parts=100, accepted=0.02, max_faults=3)
    for _ in range(100):
        assert not trial.is_over
        assert trial.on_result(BAD) is None
        assert trial.on_pair(BAD, BAD) is None
    assert trial.is_over


def test_its_own_failures_end_a_trial() -> None:
    trial = Canary(parts=100, accepted=0.02, max_faults=3)
    assert [trial.on_result(one) for one in (FAILED, GOOD, FAILED, DARK, DARK, DARK)] == [None] * 6
    for _ in range(99):
        assert trial.on_result(GOOD) is None, "long ago does not count"
    assert trial.on_result(FAILED) is None
    assert trial.on_result(FAILED) is None
    alarm = trial.on_result(FAILED)
    assert alarm is not None
    assert alarm.reason == "faults"
    not_finite = Canary(parts=100, accepted=0.02, max_faults=3).on_result(NAN)
    assert not_finite is not None
    assert not_finite.reason == "not_finite", "once is enough"


@pytest.mark.parametrize("rate", [0.02, 0.01])
def test_false_alarms_are_as_rare_as_promised(rate: float) -> None:
    """Of trials of 2000 parts whose rate is what was accepted, or less: at most ALPHA/2 of a test's ever alarm."""
    rng = np.random.default_rng(7)
    test = RateTest(0.02, ALPHA / 2)
    alarms = 0
    for _ in range(10):
        # Forty trials at once, by the numbers of the test itself.
        happened = rng.random((40, 2000, 1)) < rate
        evidence = np.cumsum(np.where(happened, test._yes, test._no), axis=1) + test._log_evidence
        alarms += int((np.logaddexp.reduce(evidence, axis=2).max(axis=1) >= test._bar).sum())
    assert alarms <= 3, "0.2 are expected at most; 4 or more would be a chance of less than 1 in 10,000"


@given(st.floats(0.005, 0.5), st.floats(0, 1))
def test_evidence_is_worth_at_most_one_on_average(accepted: float, share: float) -> None:
    """One step's expected value, for every true rate up to the accepted one: what Ville's inequality asks."""
    test = RateTest(accepted, ALPHA)
    true = accepted * share
    expected = true * np.exp(test._yes) + (1 - true) * np.exp(test._no)
    assert (expected <= 1 + 1e-9).all()


def release(**changes: object) -> Release:
    digest = uuid.uuid4().hex * 2
    manifest = BlobManifest(sha256=digest, size_bytes=10, chunk_bytes=10, crc32s=b"1234")
    values = {
        "release": uuid.uuid4().hex,
        "product": "p",
        "manifest": manifest,
        "key": "0" * 16,
        "name": "n",
        "published": NOW,
        **changes,
    }
    return Release(**values)  # type: ignore[arg-type]


def taken(entry: ProductState, offered: Release, keep: int = 2) -> ProductState:
    entry = advance_candidate(begin_candidate(entry, offered, NOW), "shadow")
    return promote_candidate(entry, NOW, keep=keep, disagreement=None)


def test_one_model_after_the_other_and_back_to_the_file() -> None:
    entry = ProductState(configured="f" * 64)
    first, second, third, fourth = (release() for _ in range(4))
    for one in (first, second, third, fourth):
        entry = confirm_present(taken(entry, one), NOW, None)
    assert entry.present_sha256 == fourth.manifest.sha256
    assert [one.release for one in entry.previous] == [third.release, second.release], "keep = 2"
    assert entry.needed == {one.manifest.sha256 for one in (second, third, fourth)}
    shown = [one.sha256 for one in entry.earlier()]
    assert shown == [third.manifest.sha256, second.manifest.sha256, "f" * 64]
    for expected in shown:
        entry = roll_back_present(entry, NOW, reason="command", detail="")
        assert entry.present_sha256 == expected
    assert entry.present is None
    assert entry.needed == frozenset()
    assert [one.fate for one in entry.outcomes] == ["rolled_back"] * 3 + ["confirmed"]
    assert set(entry.decided) == {one.release for one in (first, second, third, fourth)}


def test_straight_to_the_file() -> None:
    entry = taken(taken(ProductState(configured="f" * 64), release()), release())
    assert roll_back_present(entry, NOW, reason="command", detail="", to_file=True).present_sha256 == "f" * 64


def test_a_candidate_gives_way_to_the_next() -> None:
    first, second = release(), release()
    entry = begin_candidate(begin_candidate(ProductState(configured="f" * 64), first, NOW), second, NOW)
    assert entry.candidate is not None
    assert entry.candidate.release == second
    assert (entry.outcomes[0].release, entry.outcomes[0].fate) == (first.release, "superseded")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    entry = begin_candidate(taken(ProductState(configured="f" * 64), release()), release(), NOW)
    ModelStateFile(path).save("p", entry)
    assert ModelStateFile(path).state.products == {"p": entry}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b'{"format": 1, "products": {"p": {}}}', "damaged"),
        (b'{"format": 2, "products": 7}', "format 2, this version reads 1"),
        (b"[" * 100_000, "damaged"),
    ],
)
def test_a_record_that_cannot_be_read_is_no_reason_to_guess(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(data)
    with pytest.raises(StorageError, match=words) as raised:
        ModelStateFile(path)
    assert "move record.json away" in str(raised.value)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "change",
    [
        {"public_keys": ()},
        {"shadow_parts": -1},
        {"max_disagreement": 0.6},
        {"max_slowdown": 0.5},
        {"keep": 0},
        {"max_faults": 0},
        {"max_bytes": 0},
        {"trial_parts": -1},
    ],
)
def test_a_configuration_that_makes_no_sense(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"models: [a-z_]+ must be "):
        parse_config(b"", ModelsConfig, "models", {**msgspec.structs.asdict(CONFIG), **change})


def test_an_announcement_is_for_the_product_of_its_topic() -> None:
    announced = release(product="a piece/with + signs")
    assert decode_release(encode_message(announced), "a piece/with + signs") == announced
    with pytest.raises(FederationError, match="on the topic of"):
        decode_release(encode_message(announced), "another")


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_junk_is_refused_in_one_way(data: bytes) -> None:
    for decode in (decode_line_models, lambda data: decode_release(data, "p")):
        with pytest.raises(FederationError):
            decode(data)


def test_what_a_line_says_is_read_as_it_was_said() -> None:
    said = LineModels(boot="0" * 32)
    assert decode_line_models(encode_message(said)) == said
    assert said.of("p") is None
