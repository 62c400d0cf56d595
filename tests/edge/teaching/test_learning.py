"""Learning, looking, trying and going live: with the real `fit` in its process, and real models on the camera."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge.config import VerdictConfig
from edge.config.inspection import RoiConfig
from edge.config.outputs import TeachingConfig
from edge.teaching.look import with_threshold
from edge.teaching.orders import MarkedParts
from edge.teaching.record import TeachingStore
from edgeflame.errors import ConfigError, DataError, EdgeFlameError, UsageError
from edgeflame.package import read_package
from tests.support.taught_line import TaughtLine, bad_part, part, taught_line
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(600)
REGION = (8, 8, 112, 80)


@pytest.fixture(scope="module")
def learnt_state(tmp_path_factory: pytest.TempPathFactory, package_file: Path) -> Path:
    """The state of a line that has learnt ``cap`` from 14 parts, one of them bad."""
    state = tmp_path_factory.mktemp("learnt")
    with taught_line(state, package_file) as line:
        line.order("new")
        line.feed(part(1))
        line.order("region", region=REGION)
        line.collect(13)
        line.order("collect")
        line.feed(bad_part(50))
        wait_for(lambda: line.order("status").num_parts == 14, "the bad one")
        line.order("stop")
        stood = line.learn()
        assert stood.problem is None
    return state


@pytest.fixture(scope="module")
def clean_state(tmp_path_factory: pytest.TempPathFactory, learnt_state: Path, package_file: Path) -> Path:
    """The same, learnt again without the bad part."""
    state = Path(shutil.copytree(learnt_state, tmp_path_factory.mktemp("clean") / "state"))
    with taught_line(state, package_file) as line:
        line.order("throw-out", photographs=("00014.png",))
        assert line.learn().problem is None
    return state


@pytest.fixture
def spoilt(learnt_state: Path, tmp_path: Path) -> Path:
    """A copy of the first."""
    return Path(shutil.copytree(learnt_state, tmp_path / "state"))


@pytest.fixture
def state(clean_state: Path, tmp_path: Path) -> Path:
    """A copy of the second."""
    return Path(shutil.copytree(clean_state, tmp_path / "state"))


class TestLook:
    """What a person sees before anything goes live."""

    def test_the_bad_part_among_the_collected_stands_first(self, spoilt: Path, package_file: Path) -> None:
        with taught_line(spoilt, package_file) as line:
            stood, scores = line.order("status"), line.teacher.scores("cap")
            assert (stood.stage, stood.is_outdated) == ("learnt", False)
            assert stood.learnt is not None
            assert stood.learnt.region == REGION
            worst = scores.photographs[0]
            assert worst.name == "00014.png"
            assert worst.score > 2 * scores.photographs[1].score
            assert worst.map
            assert line.teacher.picture("cap", "heat", worst.name, side=320) is not None
            assert "good photographs rejected" in (stood.promise or "")
            assert [one.photographs for one in scores.moving] == [("00014.png",)]
            assert any("00014.png moves the threshold by itself" in note for note in stood.notes)
            # Thrown out, it is as if it had never been there once it is learnt again.
            assert line.order("throw-out", photographs=(worst.name,)).is_outdated
            before = stood.learnt.threshold
            again = line.learn()
            assert again.learnt is not None
            assert again.learnt.threshold < before
            assert len(again.learnt.photographs) == 13
            assert not again.is_outdated

    def test_other_thresholds_say_what_they_reject_and_promise(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            scores = line.teacher.scores("cap")
            counts = [choice.rejected_parts for choice in scores.choices]
            assert counts == sorted(counts, reverse=True)
            assert counts[-1] == 0
            for choice in scores.choices:
                assert choice.rejected_photographs == sum(one.score > choice.value for one in scores.photographs)
                assert choice.expected <= choice.promised <= 1
            with pytest.raises(UsageError, match="none of the thresholds"):
                line.order("threshold", threshold=scores.choices[-1].value * 3)
            chosen = scores.choices[-2]
            stood = line.order("threshold", threshold=chosen.value)
            assert f"at most {chosen.promised:.1%}" in (stood.promise or "")
            assert line.order("threshold").learnt.chosen is None  # type: ignore[union-attr]

    def test_the_chosen_threshold_is_in_the_package(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            chosen = line.teacher.scores("cap").choices[-2].value
            line.order("threshold", threshold=chosen)
            line.order("live")
            assert line.worker.inspector.threshold == chosen
            package = read_package(state / "teaching" / "cap" / "models" / "1.edgeflame")
            assert package.manifest.threshold.value == chosen
            assert package.manifest.provenance["chosen"]
            with pytest.raises(DataError, match="none of the thresholds"):
                with_threshold(package_file, state / "x.edgeflame", line.teacher.scores("cap"), 1.0)


class TestMarks:
    """Learning again, with what people marked."""

    def test_a_candidate_is_learnt_compared_and_goes_live_with_its_head(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            before = line.order("live").live[0]
            assert line.order("status").marked == MarkedParts()
            line.mark_parts(REGION)
            assert line.order("status").marked == MarkedParts(good=2, bad=8)
            stood = line.learn(marks=True)
            assert stood.problem is None
            assert stood.learnt is not None
            marks = stood.learnt.marks
            assert marks is not None
            assert (marks.num_good_marks, marks.num_bad_marks) == (2, 8)
            assert marks.left_out == {"of another product than cap": 1}
            assert "marked bad that the present package misses" in marks.comparison
            assert (stood.stage, stood.is_outdated, stood.learnt.region) == ("learnt", False, REGION)
            assert line.feed(part(1)).model == before.model
            # A threshold that a person chooses leaves the head in the package.
            scores = line.teacher.scores("cap")
            assert {one.name for one in scores.photographs} > {"marks/good/good-0.png", "00001.png"}
            line.order("threshold", threshold=scores.choices[-1].value)
            line.order("live")
            package = read_package(state / "teaching" / "cap" / "models" / "2.edgeflame")
            assert package.head is not None
            assert package.manifest.threshold.value == scores.choices[-1].value
            assert package.manifest.provenance["learnt_from_marks"]["previous_package"].startswith(before.model)
            assert line.feed(bad_part(3)).verdict == "fail"
            # And from the photographs alone, as before.
            again = line.learn()
            assert again.learnt is not None
            assert again.learnt.marks is None

    def test_what_cannot_be_learnt_is_said_and_changes_nothing(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            learnt = line.order("status").learnt
            with pytest.raises(UsageError, match="no part is marked"):
                line.order("learn", marks=True)
            # Of another region: none can be used.
            line.marks.add("other", part(1)[:40], "bad", product="cap")
            stood = line.learn(marks=True)
            assert "no mark can be used; 1 left out: pictures of another shape" in (stood.problem or "")
            assert stood.learnt == learnt
            line.order("region", region=(0, 0, 96, 96))
            with pytest.raises(UsageError, match="the region has changed"):
                line.order("learn", marks=True)
            line.order("new", "lid")
            line.collect(10, product="lid")
            line.marks.add("lid", part(2), "bad", product="lid")
            with pytest.raises(UsageError, match="nothing has been learnt yet"):
                line.order("learn", "lid", marks=True)

    def test_killed(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            learnt = line.order("status").learnt
            line.mark_parts(REGION)
            line.order("learn", marks=True)
            wait_for(lambda: line.teacher._learner.process_id is not None, "the process")
            process = line.teacher._learner.process_id
            assert process is not None
            os.kill(process, signal.SIGKILL)
            wait_for(lambda: line.order("status").learning is None, "its end")
            stood = line.order("status")
            assert "killed by SIGKILL" in (stood.problem or "")
            assert stood.learnt == learnt
            assert stood.marked == MarkedParts(good=2, bad=8)
            assert line.feed(part(1)).verdict != "unknown"


class TestPrior:
    """Leaning on another product's model."""

    def test_five_parts_are_enough_and_marks_keep_it(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.feed(part(1))
            line.order("region", region=REGION)
            assert line.collect(5).priors == ("tile",)
            with pytest.raises(DataError, match="at least 10 are needed"):
                line.order("learn")
            with pytest.raises(UsageError, match="no other product of this line; there are: tile"):
                line.order("learn", prior="cap")
            stood = line.learn(prior="tile")
            assert stood.problem is None
            assert stood.learnt is not None
            assert (stood.learnt.prior, stood.learnt.marks) == ("tile", None)
            folder = tmp_path / "teaching" / "cap"
            told = read_package(folder / stood.learnt.file).manifest.provenance["statistics"]["prior"]
            assert told["product"] == "test piece"
            line.mark_parts(REGION)
            stood = line.learn(marks=True, prior=None)
            assert stood.problem is None
            assert stood.learnt is not None
            assert stood.learnt.prior == "tile"
            assert stood.learnt.marks is not None
            assert "prior" in read_package(folder / stood.learnt.file).manifest.provenance["statistics"]


class TestTrial:
    """Trying."""

    def test_alone_each_verdict_is_marked_and_the_camera_goes_back(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            before = line.feed(part(7))
            assert not before.trial
            assert line.order("try", alone=True).stage == "trying"
            result = line.feed(part(8))
            assert (result.trial, result.verdict) == (True, "pass")
            assert line.feed(bad_part(9)).verdict == "fail"
            assert line.control.statuses()[0].trial
            with pytest.raises(UsageError, match="is being tried"):
                line.teacher._trials.begin("lid", "camera", package_file, alone=True, folder=state)
            line.order("end-trial")
            after = line.feed(part(10))
            assert (after.trial, after.model) == (False, before.model)
            with pytest.raises(UsageError, match="not being tried"):
                line.order("end-trial")

    def test_beside_it_has_no_effect_and_says_how_the_two_differ(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            model = line.feed(part(7)).model
            line.order("try")

            def compared() -> int:
                line.feed(part(200 + len(line.results)))
                trial = line.order("status").trial
                assert trial is not None
                assert trial.problem is None
                return 0 if trial.found is None else trial.found.parts

            wait_for(lambda: compared() >= 3, "parts that both have inspected", timeout_s=300)
            assert {result.model for result in line.results} == {model}
            assert not any(result.trial for result in line.results)
            line.order("end-trial")

    def test_a_trial_ends_with_the_daemon(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            line.order("try", alone=True)
        with taught_line(state, package_file) as line:
            assert line.order("status").stage == "learnt"
            assert not line.feed(part(1)).trial

    def test_the_plc_is_told_unknown(self) -> None:
        from edge.config.outputs import ModbusConfig
        from edge.delivery.plc import PlcSink, encode_result
        from edge.result import Inspected
        from tests.support.inspection_results import result

        sink = PlcSink(ModbusConfig(host="127.0.0.1", port=1, timeout_s=0.1))
        try:
            one = msgspec.structs.replace(result(1, "pass"), trial=True)
            sink.accept(Inspected(result=one, image=None, anomaly_map=None))
            assert sink._counts == {"pass": 0, "fail": 0, "unknown": 1}
            assert [encode_result(waiting, layout=1)[0] for waiting, _ in sink._waiting] in ([3], [])
        finally:
            sink.close()


class TestGoingLive:
    """Going live and back, over restarts."""

    def test_there_and_back_over_restarts(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            before = line.feed(part(7))
            assert line.order("live").stage == "live"
            live = line.feed(part(8))
            assert live.model != before.model
            assert (live.trial, live.verdict) == (False, "pass")
            assert line.feed(bad_part(3)).verdict == "fail"
            assert line.control.describe().products["cap"].endswith("models/1.edgeflame")
            with pytest.raises(UsageError, match="go back first"):
                line.order("discard")
        with taught_line(state, package_file) as line:
            assert line.feed(part(9)).model == live.model
            # A second model of the product, and back to the first, and to what was before.
            line.order("threshold", threshold=line.teacher.scores("cap").choices[-1].value)
            line.order("live")
            second = line.feed(part(10))
            assert second.model != live.model
            assert len(line.order("back").live) == 1
            assert line.feed(part(11)).model == live.model
        with taught_line(state, package_file) as line:
            assert line.feed(part(12)).model == live.model
            line.order("back")
            assert line.feed(part(13)).model == before.model
            with pytest.raises(UsageError, match="nothing to go back"):
                line.order("back")
        with taught_line(state, package_file) as line:
            assert line.feed(part(14)).model == before.model
            line.order("discard")

    def test_the_first_product_of_a_line_goes_live_and_back_to_none(self, state: Path) -> None:
        with taught_line(state, None) as line:
            assert line.feed(part(1)).reasons == ("model_not_ready",)
            assert line.control.statuses()[0].not_ready
            line.order("live")
            assert line.feed(part(2)).verdict == "pass"
            assert not line.control.statuses()[0].not_ready
        with taught_line(state, None) as line:
            assert line.feed(part(2)).verdict == "pass"
            line.order("back")
            assert line.feed(part(3)).reasons == ("model_not_ready",)

    def test_what_the_camera_would_not_use_as_learnt_is_refused(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file, verdict=VerdictConfig(threshold=3.0)) as line:
            for action in ("live", "try"):
                with pytest.raises(ConfigError, match=r"verdict\.threshold"):
                    line.order(action)
        with (
            taught_line(state, package_file, roi=RoiConfig(crop=(0, 0, 64, 64))) as line,
            pytest.raises(ConfigError, match=r"roi\.crop"),
        ):
            line.order("live")
        with taught_line(state, package_file) as line:
            line.feed(np.tile(part(4), (2, 2, 1)))
            with pytest.raises(DataError, match="gives 256x192 pixels now"):
                line.order("live")

    def test_a_package_that_cannot_be_opened_leaves_the_camera_as_it_is(self, state: Path, package_file: Path) -> None:
        with taught_line(state, package_file) as line:
            model = line.feed(part(7)).model
            learnt = next((state / "teaching" / "cap" / "learnt").glob("*.edgeflame"))
            learnt.write_bytes(learnt.read_bytes()[:5000])
            with pytest.raises(EdgeFlameError):
                line.order("live")
            assert line.order("status").live == ()
            assert line.feed(part(8)).model == model
            assert not list((state / "teaching" / "cap" / "models").iterdir())


def begun(line: TaughtLine) -> None:
    """Parts enough are collected, and learning has begun."""
    line.order("new")
    line.collect(10)
    line.order("learn")
    wait_for(lambda: line.teacher._learner.process_id is not None, "the process")


class TestLearningThatFails:
    """The line inspects on, and the state is as before."""

    def test_killed(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            begun(line)
            process = line.teacher._learner.process_id
            assert process is not None
            os.kill(process, signal.SIGKILL)
            assert line.feed(part(1)).verdict != "unknown"
            wait_for(lambda: line.order("status").learning is None, "its end")
            stood = line.order("status")
            assert (stood.problem or "").startswith("the learning process was killed by SIGKILL (as the system does")
            assert (stood.num_parts, stood.learnt, stood.stage) == (10, None, "stopped")
            assert not (tmp_path / "teaching" / "cap" / "learning").exists()

    def test_out_of_memory(self, tmp_path: Path, package_file: Path) -> None:
        limit = TeachingConfig(max_memory_mib=64.0)
        with taught_line(tmp_path, package_file, teaching=limit) as line:
            begun(line)
            wait_for(lambda: line.order("status").learning is None, "its end", timeout_s=300)
            assert "more than the 64 MiB of memory" in (line.order("status").problem or "")
            assert line.feed(part(1)).verdict != "unknown"

    def test_out_of_disk(self, tmp_path: Path, package_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Files of the process may have no more than a few kilobytes, as on a full disk.
        monkeypatch.setattr("edge.teaching.learning.sys.executable", str(_full_disk(tmp_path)))
        with taught_line(tmp_path / "state", package_file) as line:
            line.order("new")
            line.collect(10)
            stood = line.learn()
            assert "nothing was learnt" in (stood.problem or "")
            assert (stood.learnt, stood.num_parts) == (None, 10)
            assert line.feed(part(1)).verdict != "unknown"

    def test_cancelled_and_learnt_only_once_at_a_time(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            begun(line)
            for action in ("learn", "collect", "take", "region", "discard"):
                with pytest.raises(UsageError, match="is being learnt"):
                    line.order(action)
            line.order("new", "lid")
            with pytest.raises((UsageError, DataError)):
                line.order("learn", "lid")
            line.order("cancel")
            wait_for(lambda: line.order("status").learning is None, "its end")
            assert line.order("status").problem == "learning was cancelled"
            with pytest.raises(UsageError, match="not being learnt"):
                line.order("cancel")

    def test_a_daemon_that_ended_meanwhile_says_so(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            begun(line)
            process = line.teacher._learner.process_id
        assert process is not None
        wait_for(lambda: not Path(f"/proc/{process}").exists(), "the process has gone with the daemon")
        # As after a power cut, where nothing could be noted any more.
        store = TeachingStore(tmp_path / "teaching")
        store.change("cap", lambda one: msgspec.structs.replace(one, learning_since=one.created, problem=None))
        with taught_line(tmp_path, package_file) as line:
            assert "interrupted" in (line.order("status").problem or "")
            assert line.order("status").num_parts == 10

    def test_a_base_network_that_is_none_or_much_larger_than_the_region(
        self, tmp_path: Path, package_file: Path
    ) -> None:
        base = tmp_path / "base.edgeflame"
        base.write_bytes(b"no package")
        with taught_line(tmp_path / "a", package_file, teaching=TeachingConfig(base=str(base))) as line:
            line.order("new")
            line.collect(10)
            stood = line.learn()
            assert (stood.problem or "").startswith("nothing was learnt: ")
            assert "base.edgeflame" in (stood.problem or "")
        with taught_line(tmp_path / "b", package_file, teaching=TeachingConfig(base=str(tmp_path / "gone"))) as line:
            line.order("new")
            line.collect(10)
            with pytest.raises(DataError, match=r"teaching\.base: no such file"):
                line.order("learn")
            # What is smaller than half of what the network looks at is told of.
            assert line.order("status").notes == ()

    def test_a_region_that_the_network_would_blow_up_is_told_of(self, tmp_path: Path, package_file: Path) -> None:
        from edge.teaching.standing import standing_of

        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.feed(part(1))
            line.order("region", region=(0, 0, 32, 32))
            record = line.teacher._store.get("cap")
            notes = standing_of(
                record, scores=None, inspector=line.worker.inspector, camera_frame=None, num_passed_over=0,
                learning=None, trial=None,
            ).notes  # fmt: skip
            assert notes == ()
            small = msgspec.structs.replace(record, region=(0, 0, 40, 20))
            (note,) = standing_of(
                small, scores=None, inspector=line.worker.inspector, camera_frame=None, num_passed_over=0,
                learning=None, trial=None,
            ).notes  # fmt: skip
            assert "40x20 pixels, and the base network looks at 64x64" in note


def _full_disk(folder: Path) -> Path:
    """An interpreter whose files may not grow beyond a few kilobytes."""
    import sys

    script = folder / "python"
    script.write_text(f'#!/bin/sh\nulimit -f 16\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script
