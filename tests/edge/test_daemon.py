"""Drift and self-tests in a running daemon: what is seen, said, remembered, and kept out of the production."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cli import cli
from edge.camera_requests import GoldenRequests
from edge.camera_worker import CameraWorker
from edge.cameras import Cameras, Overrides, Plan, plan_cameras
from edge.config import InspectConfig
from edge.config.inspection import DriftConfig, SelfTestConfig
from edge.control import DaemonControl
from edge.daemon import open_monitoring
from edge.drift.monitor import SavedMonitor
from edge.drift.watcher import DriftModel, DriftWatcher
from edge.frame import Captured, make_frame
from edge.golden_parts import GoldenTester, golden_photographs, is_due
from edge.inspector import InspectorLoader
from edge.result import Inspected, Result
from edge.status import GoldenReport, GoldenStatus
from edgeflame.config import parse_config
from edgeflame.drift_reference import image_streams, make_drift_reference, part_streams
from edgeflame.errors import ConfigError, DataError, EdgeFlameError, UsageError
from edgeflame.images import write_image
from edgeflame.package import read_package, write_package
from tests.support.inspection_results import inspected as judged
from tests.support.small_package import LEARNING, bad_image, good_image, write_images, write_small_package
from tests.support.waiting import wait_for

QUICK = DriftConfig(parts_per_year=20_000, alike=1, max_per_s=1e6, learn=60)


@pytest.fixture(scope="module")
def package_with_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small package, with what good images are like."""
    from edge.runtimes.load import open_runtime

    folder = tmp_path_factory.mktemp("reference")
    package = read_package(write_small_package(folder / "plain.edgeflame"))
    runtime = open_runtime(package.model_onnx, device="cpu")
    images = [LEARNING.input.apply(good_image(seed, 96)) for seed in range(200)]
    parts = [
        part_streams(float(scores[0]), maps[0]) for scores, maps, _ in (runtime.score(one[None]) for one in images)
    ]
    condition = make_drift_reference(
        {name: np.array([one[name] for one in parts]) for name in ("score", "embedding")},
        [image_streams(image, None) for image in images],
        num_parts=200,
        num_images=200,
    )
    path = folder / "small.edgeflame"
    write_package(
        path,
        manifest=package.manifest,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        condition=condition,
    )
    return path


@dataclass(frozen=True)
class Daemon:
    """A daemon's camera workers and control, with the results so far."""

    plan: Plan
    workers: Sequence[CameraWorker]
    control: DaemonControl
    told: list[Result]


@contextlib.contextmanager
def daemon(tmp_path: Path, package: Path, *, source: str, **sections: Any) -> Iterator[Daemon]:
    """Cameras, control, drift and self-tests as a daemon has them, without page and broker."""
    config = InspectConfig(**sections)
    loader = InspectorLoader(device="cpu", num_threads=1)
    plan = plan_cameras(config, model=package, source=source, product_of=lambda _: "tile")
    overrides = Overrides(None)
    cameras = Cameras(plan, loader, overrides)
    workers = cameras.workers
    control = DaemonControl(cameras, overrides=overrides)
    told: list[Result] = []
    halt = threading.Event()

    def accept(inspected: Inspected) -> None:
        told.append(inspected.result)

    thread = threading.Thread(target=workers[0].run, args=(accept, halt), daemon=True)
    with open_monitoring(plan, workers, control, tmp_path / "state"):
        thread.start()
        try:
            yield Daemon(plan, workers, control, told)
        finally:
            halt.set()
            thread.join(20)


def photographs(folder: Path, *, wrong: bool = False) -> Path:
    for kind, make in (("good", good_image), ("bad", good_image if wrong else bad_image)):
        (folder / kind).mkdir(parents=True)
        for seed in range(2):
            write_image(folder / kind / f"{seed}.png", make(seed, 96))
    (folder / "good" / "notes.txt").write_text("not a photograph")
    return folder


class TestDrift:
    """Of a folder of pictures, through the whole command."""

    def run(self, tmp_path: Path, package: Path, photos: Path) -> tuple[SavedMonitor, str]:
        config = tmp_path / "line.toml"
        config.write_text("[drift]\nparts_per_year = 20000\nalike = 1\nmax_per_s = 1e6\n")
        arguments = ["inspect", "--model", package, "--source", photos, "--config", config, "--device", "cpu"]
        arguments += ["--state", tmp_path / "state", "--threads", "1"]
        result = CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        (file,) = (tmp_path / "state" / "drift" / "camera").glob("*.json")
        assert file.stem == read_package(package).sha256[:12]
        return msgspec.json.decode(file.read_bytes(), type=SavedMonitor), result.stderr

    def test_a_weaker_lamp_is_the_cameras_matter_and_a_restart_goes_on(
        self, tmp_path: Path, package_with_reference: Path
    ) -> None:
        for name, gain in (("same", 1.0), ("dark", 0.85)):
            (tmp_path / name).mkdir()
            for seed in range(120):
                image = (good_image(5000 + seed, 96) * gain).astype(np.uint8)
                write_image(tmp_path / name / f"{seed:03d}.png", image)
        saved, said = self.run(tmp_path, package_with_reference, tmp_path / "same")
        assert {name for name, stream in saved.streams.items() if stream.alarm_direction is not None} == set()
        assert "drift" not in said
        saved, said = self.run(tmp_path, package_with_reference, tmp_path / "dark")
        assert saved.streams["brightness"].alarm_direction == 1
        assert "the picture changed" in said
        assert "brightness lower" in said
        # Left as it is, the alarm is still there after the next start, over parts as before.
        saved, said = self.run(tmp_path, package_with_reference, tmp_path / "same")
        assert saved.streams["brightness"].alarm_direction == 1

    def test_what_cannot_be_read_begins_anew(self, tmp_path: Path, package_with_reference: Path) -> None:
        photos = write_images(tmp_path / "photos")
        folder = tmp_path / "state" / "drift" / "camera"
        folder.mkdir(parents=True)
        file = folder / f"{read_package(package_with_reference).sha256[:12]}.json"
        for junk in (b"", b"\xff\x00", b'{"streams": {"score": {"rank": "high"}}}', b'{"format": 77}'):
            file.write_bytes(junk)
            saved, _ = self.run(tmp_path, package_with_reference, photos)
            assert saved.format == 1

    def test_cleared_and_learnt_anew_on_command(self, tmp_path: Path, package_with_reference: Path) -> None:
        photos = tmp_path / "dark"
        photos.mkdir()
        for seed in range(200):
            write_image(photos / f"{seed:03d}.png", (good_image(seed, 96) * 0.8).astype(np.uint8))
        heard = threading.Event()
        with daemon(tmp_path, package_with_reference, source=str(photos), drift=QUICK) as running:
            running.control.on_change(heard.set)

            def condition() -> str:
                drift = running.control.statuses()[0].drift
                return drift.condition.value if drift is not None else "none yet"

            wait_for(lambda: condition() == "alarm", "an alarm")
            assert heard.is_set()
            wait_for(lambda: running.control.statuses()[0].ended, "the end of the folder")
            running.control.handle_drift(None, "clear")
            assert condition() == "ok"
            running.control.handle_drift("camera", "relearn")
            assert condition() == "learning"
            with pytest.raises(UsageError, match="no camera"):
                running.control.handle_drift("other", "clear")

    def test_switched_off_nothing_is_watched(self, tmp_path: Path, package_with_reference: Path) -> None:
        photos = write_images(tmp_path / "photos")
        off = DriftConfig(enabled=False)
        with daemon(tmp_path, package_with_reference, source=str(photos), drift=off) as running:
            wait_for(lambda: running.workers[0].status().ended, "the end of the folder")
            assert running.control.statuses()[0].drift is None
            with pytest.raises(UsageError, match="not watched"):
                running.control.handle_drift(None, "clear")
        assert not (tmp_path / "state" / "drift").exists()


class TestGolden:
    """The self-test."""

    def test_photographs_that_are_judged_rightly_pass(self, tmp_path: Path, package_with_reference: Path) -> None:
        golden = SelfTestConfig(folder=str(photographs(tmp_path / "golden")))
        source = "boards:warm_wood?parts=100000"
        with daemon(tmp_path, package_with_reference, source=source, self_test=golden) as running:
            report = running.control.test_golden_parts()
            assert isinstance(report, GoldenReport)
            assert (report.passed, report.message) == (True, "4 golden parts judged rightly")
            assert [check.part for check in report.checks] == ["good/0.png", "good/1.png", "bad/0.png", "bad/1.png"]
            status = running.control.statuses()[0]
            assert status.golden is not None
            assert status.golden.word == "passed"
            assert status.not_ready == ()
        # No photograph is among the results.
        assert not any(result.golden or result.part_id.startswith("golden") for result in running.told)
        kept = msgspec.json.decode((tmp_path / "state" / "golden" / "camera.json").read_bytes(), type=GoldenStatus)
        assert kept.last == report

    def test_a_failed_test_is_a_reason_not_to_be_ready_until_it_is_acknowledged(
        self, tmp_path: Path, package_with_reference: Path
    ) -> None:
        golden = SelfTestConfig(folder=str(photographs(tmp_path / "golden", wrong=True)))
        source = str(write_images(tmp_path / "photos"))
        with daemon(tmp_path, package_with_reference, source=source, self_test=golden) as running:
            running.control.test_golden_parts()
            (reason,) = running.control.statuses()[0].not_ready
            assert "2 of 4 golden parts judged wrongly: bad/0.png should fail and came out pass at 0." in reason
        # Also after a restart.
        with daemon(tmp_path, package_with_reference, source=source, self_test=golden) as running:
            assert running.control.statuses()[0].not_ready == (reason,)
            running.control.acknowledge()
            status = running.control.statuses()[0]
            assert status.not_ready == ()
            assert status.golden is not None
            assert status.golden.word == "acknowledged"
        lines = (tmp_path / "state" / "golden" / "history.jsonl").read_bytes().splitlines()
        assert [msgspec.json.decode(line, type=GoldenStatus).acknowledged for line in lines] == [False, True]
        lax = msgspec.structs.replace(golden, blocks_readiness=False)
        with daemon(tmp_path, package_with_reference, source=source, self_test=lax) as running:
            running.control.test_golden_parts()
            assert running.control.statuses()[0].not_ready == ()

    def test_an_unreadable_photograph_fails_the_test(self, tmp_path: Path, package_with_reference: Path) -> None:
        folder = photographs(tmp_path / "golden")
        (folder / "bad" / "0.png").write_bytes(b"no picture")
        golden = SelfTestConfig(folder=str(folder))
        source = str(write_images(tmp_path / "photos"))
        with daemon(tmp_path, package_with_reference, source=source, self_test=golden) as running:
            report = running.control.test_golden_parts()
            assert isinstance(report, GoldenReport)
            assert not report.passed
            assert "bad/0.png should fail and came out unknown" in report.message

    def test_a_part_before_the_camera_is_marked_and_no_production(
        self, tmp_path: Path, package_with_reference: Path
    ) -> None:
        photos = tmp_path / "photos"
        photos.mkdir()
        for seed in range(400):
            write_image(photos / f"{seed:03d}.png", good_image(seed, 96))
        golden = SelfTestConfig(wait_s=20)
        with daemon(tmp_path, package_with_reference, source=str(photos), self_test=golden) as running:
            with pytest.raises(UsageError, match="folder is not configured"):
                running.control.test_golden_parts()
            running.control.pause()
            answers: list[Any] = []
            asking = threading.Thread(target=lambda: answers.append(running.control.test_golden_parts(None, "bad")))
            asking.start()
            wait_for(lambda: bool(running.workers[0]._goldens._waiting), "the request")
            with pytest.raises(UsageError, match="is running"):
                running.control.test_golden_parts(None, "good")
            running.control.resume()
            asking.join(20)
            wait_for(lambda: running.workers[0].status().ended, "the end of the folder")
        (report,) = answers
        (marked,) = [result for result in running.told if result.golden]
        assert (report.kind, report.passed, report.checks[0].part) == ("part", False, marked.part_id)
        assert running.workers[0].parts == len(running.told) - 1

    def test_neither_an_outage_nor_a_frame_from_before_the_request_is_the_golden_part(self) -> None:
        now = 10.0
        requests = GoldenRequests(lambda: now)
        answers: list[Inspected | None] = []
        asking = threading.Thread(target=lambda: answers.append(requests.wait_for_one(20)))
        asking.start()
        wait_for(lambda: bool(requests._waiting), "the request")
        picture = good_image(0)
        for number, (image, at) in enumerate([(picture, 9.9), (None, 11.0), (picture, 10.1), (picture, 10.2)]):
            frame = make_frame(
                part_id=str(number), source="s", image_bgr=image, error=None if image is not None else "away",
                captured_monotonic_s=at,
            )  # fmt: skip
            told = requests.mark_if_golden(judged(number), Captured(sequence=number, frame=frame))
            assert told.result.golden is (number == 2)
        asking.join(20)
        assert [answer.result.sequence for answer in answers if answer is not None] == [2]

    def test_a_request_that_was_given_up_marks_nothing(self, tmp_path: Path, package_with_reference: Path) -> None:
        source = str(write_images(tmp_path / "photos"))
        golden = SelfTestConfig(wait_s=0.05)
        with daemon(tmp_path, package_with_reference, source=source, self_test=golden) as running:
            wait_for(lambda: running.workers[0].status().ended, "the end of the folder")
            with pytest.raises(DataError, match=r"no part came within 0\.05 s"):
                running.control.test_golden_parts(None, "good")
            assert not running.workers[0]._goldens._waiting
        assert not any(result.golden for result in running.told)

    def test_by_the_clock(self, tmp_path: Path, package_with_reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge.golden_parts._POLL_S", 0.01)
        now = dt.datetime(2026, 3, 4, 5, 59).astimezone()
        golden = SelfTestConfig(folder=str(photographs(tmp_path / "golden")), times=("06:00", "14:00"))
        source = str(write_images(tmp_path / "photos"))
        with daemon(tmp_path, package_with_reference, source=source) as running:
            worker = running.workers[0]
            first = GoldenTester(worker, golden, folder=tmp_path / "kept", now=lambda: now)
            with first:
                # Yesterday's was missed while nothing ran.
                wait_for(lambda: first.status().last is not None, "the test that was missed")
                at = first.status().last
                now = dt.datetime(2026, 3, 4, 6, 0, 1).astimezone()
                wait_for(lambda: first.status().last is not at, "the test at six")
            again = GoldenTester(worker, golden, folder=tmp_path / "kept", now=lambda: now)
            kept = again.status().last
            assert kept is not None
            assert kept.at == now

    def test_every_photograph_is_one_however_its_folder_is_written(self, tmp_path: Path) -> None:
        folder = photographs(tmp_path / "golden")
        (folder / "bad").rename(folder / "Bad")
        (folder / "Bad" / "crack").mkdir()
        (folder / "Bad" / "1.png").rename(folder / "Bad" / "crack" / "1.png")
        found = [(path.relative_to(folder).as_posix(), kind) for path, kind in golden_photographs(folder, "any")]
        good = [("good/0.png", "good"), ("good/1.png", "good")]
        assert found == [*good, ("Bad/0.png", "bad"), ("Bad/crack/1.png", "bad")]
        (folder / "bad").mkdir()
        with pytest.raises(ConfigError, match="Bad and bad are there"):
            golden_photographs(folder, "any")

    @pytest.mark.parametrize("product", ["../outside", "..", "/outside"])
    def test_a_product_s_name_leads_to_no_folder_outside(self, tmp_path: Path, product: str) -> None:
        folder = photographs(tmp_path / "golden")
        photographs(tmp_path / "outside")
        photographs(tmp_path)
        assert all(path.is_relative_to(folder) for path, _ in golden_photographs(folder, product))

    def test_no_photographs_are_an_error_at_the_start(self, tmp_path: Path, package_with_reference: Path) -> None:
        config = tmp_path / "line.toml"
        config.write_text(f'[self_test]\nfolder = "{tmp_path / "nowhere"}"\n')
        arguments = ["inspect", "--model", str(package_with_reference), "--config", str(config), "--source"]
        with pytest.raises(EdgeFlameError, match="no photographs in"):
            CliRunner().invoke(cli, [*arguments, str(write_images(tmp_path / "photos"))], catch_exceptions=False)

    @pytest.mark.parametrize(
        ("last", "now", "due"),
        [
            (None, "2026-03-04T05:00", True),  # never tested: yesterday's last is due
            ("2026-03-03T22:00", "2026-03-04T05:59", False),
            ("2026-03-03T22:00", "2026-03-04T06:00", True),
            ("2026-03-04T06:00", "2026-03-04T13:59", False),
            ("2026-03-01T06:00", "2026-03-04T05:00", True),  # switched off for days
            ("2026-03-09T06:00", "2026-03-04T07:00", False),  # the clock was set back
        ],
    )
    def test_when_a_test_is_due(self, last: str | None, now: str, due: bool) -> None:
        times = [dt.time(6), dt.time(14), dt.time(22)]
        moment = None if last is None else dt.datetime.fromisoformat(last).astimezone()
        assert is_due(times, moment, dt.datetime.fromisoformat(now).astimezone()) is due
        assert not is_due([], moment, dt.datetime.fromisoformat(now).astimezone())

    @pytest.mark.parametrize("clock", ["06:00", "02:30", "00:00"])
    @pytest.mark.parametrize(("year", "month", "day"), [(2026, 3, 29), (2026, 10, 25)])
    def test_one_test_a_day_also_when_summer_time_begins_and_ends(
        self, clock: str, year: int, month: int, day: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        try:
            now = dt.datetime(year, month, day - 1).astimezone(dt.timezone.utc)
            end = dt.datetime(year, month, day + 2).astimezone(dt.timezone.utc)
            last, tests = now, []
            while now < end:
                if is_due([dt.time.fromisoformat(clock)], last, now.astimezone()):
                    last = now
                    tests.append(now.astimezone())
                now += dt.timedelta(minutes=5)
        finally:
            monkeypatch.undo()
            time.tzset()
        assert [moment.day for moment in tests] == list(range(day - 1, day + 2))[-len(tests) :]
        assert len(tests) == (3 if clock != "00:00" else 2)

    @pytest.mark.parametrize(
        "keys", [{"times": ["25:00"], "folder": "x"}, {"times": ["06:00"]}, {"wait_s": 0}, {"times": ["now"]}]
    )
    def test_settings_that_make_no_sense_are_refused(self, keys: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="self_test"):
            parse_config(b"", SelfTestConfig, "self_test", keys)


def test_a_drift_watcher_that_hangs_does_not_hold_up_the_stop(
    package_with_reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.drift.watcher._CLOSE_TIMEOUT_S", 0.1)
    package, goes_on, hangs = read_package(package_with_reference), threading.Event(), threading.Event()

    def model_of(model: str) -> DriftModel:
        if hangs.is_set():
            goes_on.wait(60)  # as on a disk that does not answer
        return DriftModel.of(package, scores_as_fitted=True)

    watcher = DriftWatcher("camera", QUICK, package.sha256[:12], model_of, folder=tmp_path)
    part = dataclasses.replace(judged(0), image=good_image(0), anomaly_map=np.zeros((8, 8), np.float32))
    stopped = threading.Event()

    def stop() -> None:
        watcher.__exit__(None, None, None)
        stopped.set()

    try:
        watcher.__enter__()
        hangs.set()
        frame = Captured(sequence=0, frame=make_frame(part_id="p", source="s"))
        wait_for(lambda: (watcher.on_part(frame, part), watcher._queue.full())[1], "more parts wait than it takes")
        threading.Thread(target=stop, daemon=True).start()
        assert stopped.wait(20)
    finally:
        goes_on.set()
