"""The operator's page: what it remembers, its routes over real HTTP, and the page itself in Chromium."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cli import cli
from edge.cameras import Cameras, Overrides, plan_cameras
from edge.config import CameraConfig, InspectConfig
from edge.config.inspection import SelfTestConfig
from edge.config.outputs import ImagesConfig, OutboxConfig, WebConfig
from edge.control import DaemonControl
from edge.daemon import open_monitoring
from edge.delivery.outbox import Outbox
from edge.delivery.sinks import RejectsSink
from edge.inspector import InspectorLoader
from edge.result import Inspected
from edge.status import CameraStatus, DriftCondition, DriftStatus, RolloutStatus, ShadowStatus, StreamStatus
from edge.web.history import PartHistory
from edge.web.marks import MarkBody, PartMarks
from edge.web.metrics import HostMetrics, LineMetrics, RolloutMetrics
from edge.web.page import OperatorPage
from edge.web.rejects import MAX_READ, PastRejects, RejectQuery
from edge.web.server import operator_token, serve_page
from edgeflame.config import parse_config
from edgeflame.drift_reference import STREAMS
from edgeflame.errors import ConfigError, LinkError, StorageError, UsageError
from edgeflame.images import read_image, write_image
from edgeflame.marks import MarkStore
from edgeflame.mqtt.release_messages import CandidateModel, Disagreement, ProductModels, ReleaseOutcome, RunningModel
from tests.support.inspection_results import result
from tests.support.paths import REPOSITORY
from tests.support.small_package import GRID, bad_image, good_image, write_images
from tests.support.waiting import wait_for

DOCS = REPOSITORY / "docs"
TOKEN = "let-me-in"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def part(
    sequence: int,
    verdict: str = "pass",
    *,
    captured: dt.datetime | None = None,
    picture: bool = True,
    camera: str = "camera",
) -> Inspected:
    image = good_image(sequence, 96) if verdict == "pass" else bad_image(sequence, 96)
    told = msgspec.structs.replace(
        result(sequence, verdict, part_id=f"part-{sequence:04d}"),
        camera=camera,
        captured=captured or dt.datetime.now(dt.timezone.utc),
        score={"pass": 0.5, "fail": 1.6, "unknown": None}[verdict],
        reasons={"pass": (), "fail": ("above_threshold",), "unknown": ("unreadable",)}[verdict],
    )
    heat = np.full((GRID, GRID), 0.4, np.float32)
    heat[2:4, 2:4] = 1.6 if verdict == "fail" else 0.4
    return Inspected(result=told, image=image if picture else None, anomaly_map=heat if picture else None)


class TestBoard:
    """What is shown."""

    def test_memory_is_bounded_and_rejects_outlive_the_passes_after_them(self) -> None:
        history = PartHistory(WebConfig(recent=3, rejects=2))
        for sequence, verdict in enumerate(["fail", "fail", "unknown", *["pass"] * 20]):
            history.accept(part(sequence, verdict))
        view = history.view()
        assert [shown.part_id for shown in view.rejects] == ["part-0002", "part-0001"]
        assert [shown.part_id for shown in view.recent] == ["part-0022", "part-0021", "part-0020"]
        assert view.latest is not None
        assert view.latest.part_id == "part-0022"
        kept = [key for key in range(30) if history.part(key) is not None]
        assert len(kept) == 5
        assert history.picture(view.rejects[0].key, with_heat=True) is not None
        assert history.picture(1, with_heat=True) is None  # the first reject, pushed out

    def test_counts_are_of_today_and_go_on_after_a_restart(self) -> None:
        yesterday = dt.datetime.now(dt.timezone.utc) - dt.timedelta(days=1)
        past = [part(0, "fail", captured=yesterday).result, part(1, "fail").result, part(2).result]
        history = PartHistory(WebConfig(), past)
        history.accept(part(3, "unknown"))
        today = history.view().today
        assert (today.passed, today.failed, today.unknown) == (1, 1, 1)
        assert [verdict for _, verdict in history.view().scores] == ["fail", "fail", "pass", "unknown"]
        assert history.view().scores[-1][0] is None

    def test_pictures_are_no_larger_than_asked_for(self) -> None:
        history = PartHistory(WebConfig())
        history.accept(part(0))
        assert len(history.picture(1, with_heat=False, side=40) or b"") < len(
            history.picture(1, with_heat=False) or b""
        )


def drifting(condition: DriftCondition = DriftCondition.OK, **streams: DriftCondition) -> DriftStatus:
    """What a camera's drift might be."""
    told = tuple(
        StreamStatus(
            name=name,
            condition=streams.get(name, DriftCondition.OK),
            direction="lower" if name in streams else None,
            rank=0.08 if name in streams else 0.5,
            evidence=1.0 if name in streams else 0.1,
            since=dt.datetime(2026, 1, 2, 3, 4, tzinfo=dt.timezone.utc) if name in streams else None,
            usual=(0.4, 0.6),
            learnt=None,
        )
        for name in STREAMS
    )
    message = (
        "camera or light changed: brightness lower" if streams else "parts, camera and light are as they were learnt"
    )
    return DriftStatus(condition=condition, parts=DriftCondition.OK, camera=condition, message=message, streams=told)


class Plc:
    """One that is away."""

    is_connected = False
    num_missed = 2


def _seen_as_camera(status: Callable[[], CameraStatus]) -> CameraStatus:
    return msgspec.structs.replace(status(), dropped={"superseded": 3}, source="camera:0")


@contextlib.contextmanager
def station(
    folder: Path,
    package: Path,
    *,
    cameras: Sequence[str] = ("camera",),
    golden: SelfTestConfig | None = None,
    token: str = TOKEN,
    rejects: PastRejects | None = None,
    source: str = "boards:warm_wood",
    **keys: Any,
) -> Iterator[tuple[OperatorPage, str]]:
    """A page over real cameras, whose parts are shown by hand; with drift and golden parts as in a daemon."""
    config = WebConfig(listen="127.0.0.1:0", **keys)
    settings = InspectConfig(
        products={"tile": str(package), "other": str(package)},
        cameras={name: CameraConfig(source=source, product="tile") for name in cameras},
        self_test=golden or SelfTestConfig(),
    )
    plan = plan_cameras(settings, model=None, source=None, product_of=str)
    overrides = Overrides(None)
    opened_cameras = Cameras(plan, InspectorLoader(device="cpu", num_threads=1), overrides)
    workers = opened_cameras.workers
    for worker in workers:
        worker.status = partial(_seen_as_camera, worker.status)  # type: ignore[method-assign]
    control = DaemonControl(opened_cameras, overrides=overrides, snapshots=folder / "snapshots")
    with open_monitoring(plan, workers, control, folder / "state"):
        metrics = LineMetrics(control.statuses, deliverers=[])
        expires = dt.datetime(2030, 1, 1, tzinfo=dt.timezone.utc)
        metrics.registry.register(HostMetrics(folder, {"camera": Plc()}, certificate_expires=expires))
        found = Disagreement(parts=20, differing=3, skipped=5)
        beside = ShadowStatus(product="tile", role="candidate", on_trial=False, found=found)
        figures = RolloutStatus(beside=(beside,), fates={("tile", "refused"): 2})
        metrics.registry.register(RolloutMetrics(lambda: figures))
        history = PartHistory(config)
        control.marker = marks = PartMarks(MarkStore(folder / "marks"), history, control.statuses)
        opened = OperatorPage(
            config,
            control,
            history=history,
            metrics=metrics,
            marks=marks,
            deliverers=[],
            rejects=rejects,
            token=token,
        )
        with serve_page(opened, config) as address:
            yield opened, address


def judge(opened: OperatorPage, inspected: Inspected) -> None:
    opened.history.accept(inspected)
    opened.metrics.accept(inspected)


def ask(
    address: str,
    path: str,
    *,
    method: str = "GET",
    body: bytes = b"",
    token: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        given = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path, body, {**given, **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read()


def order(address: str, camera: str = "camera", **what: Any) -> tuple[int, dict[str, Any]]:
    body = msgspec.json.encode(what)
    status, answer = ask(address, f"/api/cameras/{camera}/do", method="POST", body=body, token=TOKEN)
    return status, msgspec.json.decode(answer)


def photographs(folder: Path, *, wrong: bool = False) -> SelfTestConfig:
    for kind, make in (("good", good_image), ("bad", good_image if wrong else bad_image)):
        (folder / kind).mkdir(parents=True)
        write_image(folder / kind / "0.png", make(0, 96))
    return SelfTestConfig(folder=str(folder), wait_s=0.05)


class TestOrders:
    """What an operator may ask, over real HTTP."""

    def test_orders_need_the_token_and_make_sense(self, tmp_path: Path, package_file: Path) -> None:
        with station(tmp_path, package_file) as (_, address):
            path = "/api/cameras/camera/do"
            assert ask(address, path, method="POST", body=b'{"action": "pause"}')[0] == 401
            assert ask(address, path, method="POST", body=b'{"action": "pause"}', token="guess")[0] == 401
            assert ask(address, path, token=TOKEN)[0] == 405
            assert ask(address, path, method="POST", body=b"x" * 20_000, token=TOKEN)[0] == 413
            for junk in (b"", b"\xff", b"[]", b'{"action": "explode"}', b'{"action": "pause", "when": "now"}'):
                assert ask(address, path, method="POST", body=junk, token=TOKEN)[0] == 400
            assert order(address, "nowhere", action="pause") == (400, {"error": "there is no camera 'nowhere'"})
            assert order(address, action="product", product="unheard of")[0] == 400
            assert order(address, action="product")[0] == 400
            assert ask(address, "/readiness")[1] == b"no part has been judged since the start\n"

    def test_the_token_goes_beside_the_name_and_password_of_a_proxy(self, tmp_path: Path, package_file: Path) -> None:
        basic = {"Authorization": "Basic b3BlcmF0b3I6c2VjcmV0"}
        pause = b'{"action": "pause"}'
        with station(tmp_path, package_file) as (_, address):
            path = "/api/cameras/camera/do"
            status, answer = ask(address, path, method="POST", body=pause, headers=basic)
            assert (status, b"needs the operator's token" in answer) == (401, True)
            for header, expected in ((TOKEN, 200), ("guess", 401), ("", 401)):
                own = {**basic, "X-EdgeFlame-Token": header}
                assert ask(address, path, method="POST", body=pause, headers=own)[0] == expected

    def test_pause_resume_and_switch(self, tmp_path: Path, package_file: Path) -> None:
        with station(tmp_path, package_file, cameras=("left", "right")) as (_, address):
            assert order(address, "right", action="pause") == (200, {"ok": True, "message": "Paused."})
            assert b"right: paused" in ask(address, "/readiness")[1]
            assert order(address, "right", action="snapshot")[0] == 409
            assert order(address, "right", action="resume")[0] == 200
            assert b"paused" not in ask(address, "/readiness")[1]
            assert order(address, "left", action="product", product="other")[0] == 200
            running = msgspec.json.decode(ask(address, "/api/line")[1])
            assert [camera["product"] for camera in running["cameras"]] == ["other", "tile"]
            assert running["products"] == ["tile", "other"]

    def test_self_tests_and_what_readiness_says_of_them(self, tmp_path: Path, package_file: Path) -> None:
        with station(tmp_path, package_file, golden=photographs(tmp_path / "golden", wrong=True)) as (opened, address):
            judge(opened, part(0))
            status, answer = order(address, action="golden")
            assert (status, answer["ok"]) == (200, False)
            assert answer["message"].startswith(
                "Self-test FAILED: 1 of 2 golden parts judged wrongly: bad/0.png should"
            )
            assert ask(address, "/readiness")[0] == 503
            assert b"the self-test failed" in ask(address, "/readiness")[1]
            assert b'edgeflame_golden_passed{camera="camera"} 0.0' in ask(address, "/metrics")[1]
            assert order(address, action="acknowledge")[0] == 200
            assert ask(address, "/readiness")[0] == 200
            assert order(address, action="golden", expected="good")[0] == 409  # no part comes
            assert order(address, action="drift-clear")[0] == 200


def test_each_camera_has_its_own_view(tmp_path: Path, package_file: Path) -> None:
    with station(tmp_path, package_file, cameras=("left", "right")) as (opened, address):
        judge(opened, part(0, "fail", camera="left"))
        judge(opened, part(1, camera="right"))
        page = msgspec.json.decode(ask(address, "/api/view?camera=right")[1])
        assert (page["camera"], page["view"]["latest"]["part_id"], page["view"]["rejects"]) == (
            "right",
            "part-0001",
            [],
        )
        assert [light["latest"]["verdict"] for light in page["lights"]] == ["fail", "pass"]
        page = msgspec.json.decode(ask(address, "/api/view?camera=gone")[1])
        assert (page["camera"], page["view"]["today"]["failed"]) == ("left", 1)


def test_health_says_ready_only_while_parts_come(tmp_path: Path, package_file: Path) -> None:
    with station(tmp_path, package_file, stale_after_s=0.2) as (opened, address):
        assert ask(address, "/healthz") == (200, b"ok\n")
        assert ask(address, "/readiness") == (503, b"no part has been judged since the start\n")
        judge(opened, part(0))
        assert ask(address, "/readiness") == (200, b"ready\n")
        wait_for(lambda: ask(address, "/readiness")[0] == 503, "the line is stale")
        assert ask(address, "/readiness")[1].startswith(b"no part for ")


def test_a_folder_without_files_is_no_fault(tmp_path: Path, package_file: Path) -> None:
    (tmp_path / "arriving").mkdir()
    with station(tmp_path, package_file, source=f"watch:{tmp_path / 'arriving'}", stale_after_s=0.01) as (_, address):
        time.sleep(0.05)
        assert ask(address, "/readiness") == (200, b"ready\n")


def test_every_metric_is_documented_and_none_that_is_not_there(tmp_path: Path, package_file: Path) -> None:
    with station(tmp_path, package_file) as (opened, address):
        for sequence, verdict in enumerate(["pass", "fail", "unknown"]):
            judge(opened, part(sequence, verdict))
        text = ask(address, "/metrics")[1].decode()
    assert 'edgeflame_parts_total{camera="camera",verdict="fail"} 1.0' in text
    assert 'edgeflame_frames_dropped_total{camera="camera",reason="superseded"} 3.0' in text
    assert 'edgeflame_score_ratio_count{camera="camera"} 2.0' in text
    assert 'edgeflame_camera_up{camera="camera"} 1.0' in text
    assert 'edgeflame_plc_connected{camera="camera"} 0.0' in text
    assert 'edgeflame_plc_missed_total{camera="camera"} 2.0' in text
    assert "edgeflame_certificate_expiry_timestamp_seconds 1.8934" in text
    for name in ("shadow_differing_total", "shadow_differing"):
        assert f'edgeflame_{name}{{product="tile",role="candidate"}} 3.0' in text
    free = [re.search(rf"^edgeflame_{name} (\S+)$", text, re.MULTILINE) for name in ("state_free_bytes", "free_bytes")]
    assert free[0] is not None
    assert free[1] is not None
    assert float(free[0][1]) == float(free[1][1]) > 0
    assert 'edgeflame_releases_total{fate="refused",product="tile"} 2.0' in text
    told = set(re.findall(r"^# HELP (\S+)", text, re.MULTILINE))
    documented = set(re.findall(r"^\| `(edgeflame_\w+)`", (DOCS / "inspection.md").read_text(), re.MULTILINE))
    assert told == documented


NOON = dt.datetime(2026, 5, 4, 12, tzinfo=dt.timezone.utc)


@pytest.fixture
def past(tmp_path: Path) -> Iterator[PastRejects]:
    """Forty parts an hour apart on two cameras, every other one a reject; the pictures of the last six are kept."""
    pictures = RejectsSink(tmp_path / "pictures", ImagesConfig(max_count=6), now=lambda: NOON)
    with Outbox(tmp_path / "outbox.sqlite", OutboxConfig()) as outbox:
        for number in range(40):
            one = part(
                number,
                "fail" if number % 2 else "pass",
                captured=NOON + dt.timedelta(hours=number),
                camera="left" if number % 4 < 2 else "right",
            )
            kept = dataclasses.replace(one, result=msgspec.structs.replace(one.result, score=1.0 + number))
            outbox.append([msgspec.json.encode(kept.result)])
            pictures.accept(kept)
        yield PastRejects(tmp_path / "outbox.sqlite", pictures)


def query(**given: str) -> RejectQuery:
    return msgspec.convert(given, RejectQuery, strict=False)


class TestPastRejects:
    """Earlier rejects."""

    def test_they_are_found_by_day_camera_score_and_part(self, past: PastRejects) -> None:
        everything = past.find(query())
        assert [one.part_id for one in everything.parts][:2] == ["part-0039", "part-0037"]
        assert (len(everything.parts), everything.before) == (20, None)
        assert sum(one.has_picture for one in everything.parts) == 6
        on_the_day = past.find(query(since="2026-05-05T00:00:00Z", until="2026-05-06T00:00:00Z"))
        assert [one.captured.day for one in on_the_day.parts] == [5] * 12
        assert {one.camera for one in past.find(query(camera="right")).parts} == {"right"}
        assert min(one.ratio or 0 for one in past.find(query(score="20")).parts) >= 20
        assert [one.part_id for one in past.find(query(part="ART-0007")).parts] == ["part-0007"]
        assert past.find(query(part="part-0008")).parts == ()  # it passed

    def test_what_was_shown_goes_on_where_it_ended(self, past: PastRejects, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge.web.rejects.PAGE_SIZE", 8)
        seen, before = [], None
        for _ in range(4):
            answer = past.find(msgspec.structs.replace(query(), before=before))
            seen += [one.part_id for one in answer.parts]
            before = answer.before
            if before is None:
                break
        assert seen == [f"part-{number:04d}" for number in range(39, 0, -2)]
        assert MAX_READ > 10_000

    def test_over_http_with_pictures_and_bad_questions(
        self, tmp_path: Path, package_file: Path, past: PastRejects
    ) -> None:
        with station(tmp_path, package_file, rejects=past) as (_, address):
            status, answer = ask(address, "/api/rejects?part=0039")
            (found,) = msgspec.json.decode(answer)["parts"]
            assert (status, found["part_id"]) == (200, "part-0039")
            status, picture = ask(address, f"/api/rejects/{found['number']}.jpg?side=64")
            assert (status, picture[:2]) == (200, b"\xff\xd8")
            for gone in ("2", "0", "99999", "x", "9" * 30):
                assert ask(address, f"/api/rejects/{gone}.jpg")[0] == 404
            for junk in ("score=high", "since=yesterday", "colour=red", "before=x"):
                assert ask(address, f"/api/rejects?{junk}")[0] == 400
            assert ask(address, "/api/rejects?score=nan")[0] == 200

    def test_a_line_that_keeps_no_results_says_so(self, tmp_path: Path, package_file: Path) -> None:
        with station(tmp_path, package_file) as (_, address):
            assert ask(address, "/api/rejects") == (404, b'{"error":"this line keeps no results"}')


def test_marks_need_the_token_and_a_part_that_is_there(tmp_path: Path, package_file: Path) -> None:
    with station(tmp_path, package_file, recent=2, rejects=2) as (opened, address):
        judge(opened, part(0, "fail"))
        judge(opened, part(1, picture=False))
        good = b'{"was": "good"}'
        mark = "/api/parts/1/mark"
        assert ask(address, mark, method="POST", body=good)[0] == 401
        assert ask(address, mark, method="POST", body=good, token="guess")[0] == 401
        assert ask(address, mark, method="POST", body=b'{"was": "fine"}', token=TOKEN)[0] == 400
        assert ask(address, mark, method="POST", body=b"\xff", token=TOKEN)[0] == 400
        assert ask(address, mark, method="POST", body=b"x" * 20_000, token=TOKEN)[0] == 413
        assert ask(address, "/api/parts/9/mark", method="POST", body=good, token=TOKEN)[0] == 404
        assert ask(address, "/api/parts/2/mark", method="POST", body=good, token=TOKEN)[0] == 409
        assert ask(address, mark, token=TOKEN)[0] == 405  # GET changes nothing
        assert not (tmp_path / "marks").exists()
        assert ask(address, mark, method="POST", body=good, token=TOKEN)[0] == 200
        (kept,) = (tmp_path / "marks" / "good").iterdir()
        assert (read_image(kept) == bad_image(0, 96)).all()  # lossless, without the heat
        # A second thought moves the picture; both opinions are on record.
        assert ask(address, mark, method="POST", body=b'{"was": "bad"}', token=TOKEN)[0] == 200
        assert [path.parent.name for path in (tmp_path / "marks").glob("*/*.png")] == ["bad"]
        lines = [msgspec.json.decode(line) for line in (tmp_path / "marks" / "marks.jsonl").read_bytes().splitlines()]
        assert [(line["was"], line["result"]["part_id"]) for line in lines] == [
            ("good", "part-0000"),
            ("bad", "part-0000"),
        ]


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/static/page.js",
        "/../server.py",
        "/parts/1/server.jpg",
        "/parts/x/heat.jpg",
        "/parts/77/heat.jpg",
        "/parts/1/heat.jpg?side=0",
    ],
)
def test_what_is_not_there_is_404(tmp_path: Path, package_file: Path, path: str) -> None:
    with station(tmp_path, package_file) as (opened, address):
        judge(opened, part(0))
        assert ask(address, path)[0] == 404


def test_an_address_in_use_is_an_error(tmp_path: Path, package_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = tmp_path / "line.toml"
        config.write_text(f'[web]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\n')
        arguments = ["inspect", "--model", str(package_file), "--source", str(write_images(tmp_path / "photos"))]
        with pytest.raises(ConfigError, match="need --state DIR"):
            CliRunner().invoke(cli, [*arguments, "--config", str(config)], catch_exceptions=False)
        arguments += ["--config", str(config), "--state", str(tmp_path / "state")]
        with pytest.raises(
            LinkError, match=r"web\.listen: cannot listen on 127\.0\.0\.1:\d+ \(Address already in use\)"
        ):
            CliRunner().invoke(cli, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    "keys",
    [
        {"listen": "8080"},
        {"listen": "host:99999"},
        {"recent": 0},
        {"history": 1},
        {"stale_after_s": 0},
        {"max_marks": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="web"):
        parse_config(b"", WebConfig, "web", keys)


def test_the_token_is_made_once_and_kept_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEFLAME_OPERATOR_TOKEN", raising=False)
    token = operator_token(tmp_path)
    assert len(token) >= 16
    assert operator_token(tmp_path) == token
    assert (tmp_path / "operator-token").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("EDGEFLAME_OPERATOR_TOKEN", "from-outside")
    assert operator_token(tmp_path) == "from-outside"
    monkeypatch.setenv("EDGEFLAME_OPERATOR_TOKEN", " \t")
    with pytest.raises(UsageError, match="holds no token"):
        operator_token(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\n", b"\xff\xfe\x00", b"\x00" * 17, b"abc\x00def\n"])
def test_an_empty_or_damaged_token_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    monkeypatch.delenv("EDGEFLAME_OPERATOR_TOKEN", raising=False)
    (tmp_path / "operator-token").write_bytes(damage)
    with pytest.raises(StorageError, match="operator-token: empty or damaged"):
        operator_token(tmp_path)
    (tmp_path / "operator-token").unlink()
    assert operator_token(tmp_path)


def marking(folder: Path) -> tuple[PartMarks, PartHistory]:
    history = PartHistory(WebConfig())
    return PartMarks(MarkStore(folder), history, list), history


def test_the_same_part_before_two_cameras_is_two_marks(tmp_path: Path) -> None:
    marks, history = marking(tmp_path)
    moment = dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc)
    for camera in ("left.1", "left_1"):
        history.accept(part(1, captured=moment, camera=camera))
    files = {marks.mark(key, MarkBody(was="good")).file for key in (1, 2)}
    assert len(files) == 2
    assert len(list((tmp_path / "good").iterdir())) == 2
    with pytest.raises(UsageError, match=r"several cameras have seen 'part-0001': say which of left\.1, left_1"):
        marks.mark_part(None, "part-0001", "bad", kind=None, by="")
    assert marks.mark_part("left_1", "part-0001", "bad", kind="dent", by="qa").judged.camera == "left_1"
    with pytest.raises(UsageError, match="no part 'part-0009' is remembered"):
        marks.mark_part(None, "part-0009", "bad", kind=None, by="")


class TestMarks:
    """Marking, looking through and correcting, over real HTTP."""

    def test_what_is_said_is_kept_shown_corrected_and_taken_back(self, tmp_path: Path, package_file: Path) -> None:
        with station(tmp_path, package_file) as (opened, address):
            for sequence, verdict in enumerate(("fail", "pass", "unknown")):
                judge(opened, part(sequence, verdict))
            box = {"shape": "polygon", "points": [[10, 10], [40, 10], [40, 40], [10, 40]]}
            stroke = {"shape": "brush", "points": [[60, 60], [70, 70]], "radius": 4}
            self.post(address, "/api/parts/1/mark", was="good", by="Kim")
            kept = self.post(address, "/api/parts/2/mark", was="bad", kind="scratch", where=[box, stroke])
            self.post(address, "/api/parts/3/mark", was="bad")
            view = self.view(address)
            assert (view["good"], view["bad"], view["kinds"], view["fitting"]) == (1, 2, {"scratch": 1}, 3)
            assert [(one["part_id"], one["verdict"], one["was"], one["by"]) for one in view["marks"]] == [
                ("part-0002", "unknown", "bad", ""),
                ("part-0001", "pass", "bad", ""),
                ("part-0000", "fail", "good", "Kim"),
            ]
            assert view["marks"][1]["has_place"]
            assert self.view(address, "?was=bad&kind=-")["fitting"] == 1
            assert self.view(address, "?part=0001&camera=camera")["fitting"] == 1
            assert self.view(address, "?skip=2")["marks"][0]["part_id"] == "part-0000"
            name = kept["file"].removeprefix("bad/").removesuffix(".png")
            status, picture = ask(address, f"/api/marks/{name}.jpg?side=96")
            assert (status, picture[:2]) == (200, b"\xff\xd8")
            corrected = self.post(address, f"/api/marks/{name}", action="correct", kind="dent")
            assert (corrected["kind"], len(corrected["where"])) == ("dent", 2)
            assert self.post(address, f"/api/marks/{name}", action="correct", was="good")["file"] == f"good/{name}.png"
            assert self.post(address, f"/api/marks/{name}", action="undo")["kind"] == "dent"
            assert self.post(address, f"/api/marks/{name}", action="undo")["kind"] == "scratch"
            assert self.post(address, f"/api/marks/{name}", action="undo") is None
            assert self.view(address)["bad"] == 1
            assert ask(address, f"/api/marks/{name}.jpg")[0] == 404

    def test_what_makes_no_sense_is_refused(self, tmp_path: Path, package_file: Path) -> None:
        with station(tmp_path, package_file) as (opened, address):
            judge(opened, part(0))
            name = self.post(address, "/api/parts/1/mark", was="bad")["file"].removeprefix("bad/").removesuffix(".png")
            assert ask(address, f"/api/marks/{name}", method="POST", body=b'{"action": "delete"}')[0] == 401
            for path, body in (
                ("parts/1/mark", {"was": "good", "kind": "dent"}),
                ("parts/1/mark", {"was": "bad", "kind": "../up"}),
                ("parts/1/mark", {"was": "bad", "kind": "good"}),
                ("parts/1/mark", {"was": "bad", "where": [{"shape": "polygon", "points": []}]}),
                (f"marks/{name}", {"action": "burn"}),
                (f"marks/{name}", {"action": "correct", "was": "good", "kind": "dent"}),
                ("marks/nobody", {"action": "undo"}),
                ("marks/..%2Fup", {"action": "delete"}),
            ):
                status, _ = ask(address, f"/api/{path}", method="POST", body=msgspec.json.encode(body), token=TOKEN)
                assert status in (400, 404), (path, body)
            for junk in ("was=fine", "colour=red", "skip=x"):
                assert ask(address, f"/api/marks?{junk}")[0] == 400
            assert self.view(address)["bad"] == 1
            self.post(address, f"/api/marks/{name}", action="delete")
            assert list((tmp_path / "marks").glob("*/*.png")) == []

    def test_the_product_is_that_of_the_model_that_judged(self, tmp_path: Path, package_file: Path) -> None:
        with station(tmp_path, package_file) as (opened, address):
            model = msgspec.json.decode(ask(address, "/api/line")[1])["cameras"][0]["model"]
            judged = part(0)
            told = msgspec.structs.replace(judged.result, model=model)
            judge(opened, replace(judged, result=told))
            judge(opened, part(1))
            assert self.post(address, "/api/parts/1/mark", was="bad")["product"] == "tile"
            assert "product" not in self.post(address, "/api/parts/2/mark", was="bad")  # a model that nobody knows

    @staticmethod
    def post(address: str, path: str, **said: Any) -> Any:
        status, answer = ask(address, path, method="POST", body=msgspec.json.encode(said), token=TOKEN)
        assert status == 200, answer
        return msgspec.json.decode(answer)

    @staticmethod
    def view(address: str, query: str = "") -> dict[str, Any]:
        status, answer = ask(address, f"/api/marks{query}")
        assert status == 200, answer
        view: dict[str, Any] = msgspec.json.decode(answer)
        return view


def test_a_page_is_never_served_with_an_empty_token(tmp_path: Path, package_file: Path) -> None:
    with pytest.raises(UsageError, match="needs a token"), station(tmp_path, package_file, token=""):
        pass


_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from edge.web.server import operator_token
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4, resource.RLIM_INFINITY))
operator_token(Path(sys.argv[1]))
"""


def test_a_full_disk_leaves_no_token_rather_than_a_piece_of_one(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "EDGEFLAME_OPERATOR_TOKEN"}
    ended = subprocess.run(
        [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "StorageError" in ended.stderr
    assert list(tmp_path.iterdir()) == []


_WATCH_SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => { for (const entry of list.getEntries()) window.shifts += entry.value; })
  .observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_the_page_in_a_browser(browser: Any, tmp_path: Path, package_file: Path, width: int, height: int) -> None:
    complaints: list[str] = []
    with station(tmp_path, package_file) as (opened, address):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.add_init_script(_WATCH_SHIFTS)
        page.goto(address)
        page.get_by_text("no part yet").wait_for()
        page.get_by_text("Not ready: no part has been judged since the start.").wait_for()
        assert page.locator("#lights").is_hidden()
        for sequence, verdict in enumerate(["pass", "fail", "unknown", "pass"]):
            judge(opened, part(sequence, verdict))
        page.locator("#light.pass").wait_for()
        assert page.locator("#word").inner_text().lower() == "pass"
        assert page.locator("#ratio").inner_text() == "0.50 × threshold"
        page.get_by_text("Ready.", exact=True).wait_for()
        assert page.locator("#rejects li").count() == 2
        assert page.locator("#failed").inner_text() == "1"
        # Parts that come once the page stands move nothing.
        page.evaluate("window.shifts = 0")
        judge(opened, part(4, "fail"))
        page.locator("#light.fail").wait_for()
        page.locator("#rejects li").nth(2).wait_for()
        page.get_by_text("✕ part-0004", exact=True).wait_for()  # whose picture it is
        assert page.evaluate("window.shifts") < 0.1
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_label("heat map").uncheck()
        assert "plain.jpg" in (page.locator("#picture").get_attribute("src") or "")
        # With the keyboard alone: open the newest reject, say that it was good, close.
        page.locator("#rejects button").first.focus()
        page.keyboard.press("Enter")
        page.locator("#closer[open]").wait_for()
        assert "above threshold" in page.locator("#closer-why").inner_text()
        page.locator("#token").fill("guess")
        page.get_by_role("button", name="It was good").press("Enter")
        page.get_by_text("Not kept: that is not the operator's token.").wait_for()
        page.locator("#token").fill(TOKEN)
        page.get_by_role("button", name="It was good").press("Enter")
        page.get_by_text("Kept as good.").wait_for()
        assert len(list((tmp_path / "marks" / "good").iterdir())) == 1
        page.keyboard.press("Escape")
        page.locator("#closer[open]").wait_for(state="detached")
        page.close()
    # The refused mark is the one complaint: browsers log a 401.
    assert [text for text in complaints if "401" not in text] == []


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (360, 740)])
def test_several_cameras_drift_and_orders_in_a_browser(
    browser: Any, tmp_path: Path, package_file: Path, width: int, height: int
) -> None:
    complaints: list[str] = []
    golden = photographs(tmp_path / "golden", wrong=True)
    with station(tmp_path, package_file, cameras=("left", "right"), golden=golden) as (opened, address):
        state = drifting()
        for watcher in opened._control.drift_watchers.values():
            watcher.status = lambda: state  # type: ignore[method-assign]
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.add_init_script(_WATCH_SHIFTS)
        for sequence, camera in enumerate(["left", "right", "left"]):
            judge(opened, part(sequence, "fail" if camera == "right" else "pass", camera=camera))
        page.goto(address)
        lights = page.locator("#lights button")
        lights.nth(1).locator(".word").get_by_text("✕ fail").wait_for()
        page.locator("#light.pass").wait_for()
        # Three metres: letters of at least 15 mm, 57 pixels at 96 to the inch; a phone is held in the hand.
        if width > 1000:
            assert float(lights.nth(1).locator(".word").evaluate("e => getComputedStyle(e).fontSize")[:-2]) >= 57
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # The other camera, by the keyboard; what was chosen is still chosen when the page is loaded again.
        lights.nth(1).press("Enter")
        page.locator("#light.fail").wait_for()
        assert page.locator("#rejects li").count() == 1
        page.reload()
        page.locator("#light.fail").wait_for()
        # Drift: what it is, and since when; nothing moves when it comes. The verdict stays in view.
        page.get_by_role("tab", name="Health").click()
        assert page.locator("#inspect").is_hidden()
        page.locator("#chips .fail[aria-pressed=true]").get_by_text("✕ fail").wait_for()
        page.get_by_text("Parts, camera and light are as they were learnt.").wait_for()
        page.evaluate("window.shifts = 0")
        state = drifting(DriftCondition.ALARM, brightness=DriftCondition.ALARM)
        judge(opened, part(3, "fail", camera="right"))
        page.locator("#drift-message").get_by_text("Camera or light changed: brightness lower.").wait_for()
        assert "alarm: lower since" in page.locator("#streams tr.bad").inner_text()
        page.locator("#standing.bad").get_by_text("Camera or light changed: brightness lower.").wait_for()
        assert page.evaluate("window.shifts") < 0.1
        # Orders: without the token none, with it a self-test that fails, and is acknowledged.
        page.get_by_role("button", name="Test photographs").press("Enter")
        page.locator("#done").get_by_text("Not done: this needs the operator's token.").wait_for()
        page.locator("#order-token").fill(TOKEN)
        page.get_by_role("button", name="Test photographs").press("Enter")
        page.locator("#done.wrong").get_by_text("Self-test FAILED: 1 of 2 golden parts judged wrongly").wait_for()
        page.locator("#golden-wrong li").get_by_text("bad/0.png: should fail, came out pass").wait_for()
        page.locator("#standing").get_by_text("Not ready: right: the self-test failed").wait_for()
        page.get_by_role("button", name="Acknowledge").press("Enter")
        page.locator("#golden-message.warn").wait_for()
        # Back by the keyboard: tabs are gone through with the arrows.
        page.get_by_role("tab", name="Health").press("ArrowLeft")
        page.get_by_role("tab", name="Marks").press("ArrowLeft")
        page.get_by_role("tab", name="Teach").press("ArrowLeft")
        page.get_by_role("button", name="Pause").press("Enter")
        page.locator("#standing").get_by_text("Not ready: right: paused.").wait_for()
        # No light of a verdict while nothing is looked at.
        page.locator("#light.none").get_by_text("paused", exact=True).wait_for()
        lights.nth(1).locator(".word").get_by_text("paused").wait_for()
        assert page.locator("#ratio").inner_text().strip() == ""  # nor an old score
        page.locator("#part").get_by_text("before the pause: part-").wait_for()
        page.get_by_role("button", name="Resume").press("Enter")
        page.locator("#done.good").get_by_text("Goes on.").wait_for()
        # What cannot be undone asks again.
        page.get_by_role("tab", name="Health").click()
        page.get_by_role("button", name="Learn anew").press("Enter")
        page.get_by_role("button", name="Sure?").press("Enter")
        page.locator("#done.good").get_by_text("The next parts are learnt.").wait_for()
        page.get_by_role("tab", name="Inspect").click()
        page.locator("#products").select_option("other")
        page.locator("#product").get_by_text("other", exact=True).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()
    assert [text for text in complaints if "401" not in text] == []


def test_earlier_rejects_and_long_reasons_in_a_browser(
    browser: Any, tmp_path: Path, package_file: Path, past: PastRejects
) -> None:
    with station(tmp_path, package_file, rejects=past) as (opened, address):
        one = part(1, "unknown")
        detail = "the picture cannot be read: " + "the cable of the camera may be loose " * 8
        told = msgspec.structs.replace(one.result, detail=detail)
        judge(opened, dataclasses.replace(one, result=told))
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(address)
        why = page.locator("#why")
        why.get_by_text("cable of the camera").wait_for()
        # Read whole: nothing is cut off.
        assert why.evaluate("e => e.scrollHeight <= e.clientHeight && e.scrollWidth <= e.clientWidth")
        page.locator("#sought-part").fill("0039")
        page.locator("#sought-part").press("Enter")
        page.locator("#past-told").get_by_text("1 found; the newest first.").wait_for()
        assert "above threshold" in page.locator("#found a").inner_text()
        page.locator("#found img").evaluate("e => e.decode()")
        page.locator("#sought-part").fill("")
        page.locator("#sought-day").fill("2026-05-05")
        page.get_by_role("button", name="Find").click()
        page.locator("#past-told").get_by_text("12 found").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        # What is shown stays when the page is loaded again.
        page.get_by_role("tab", name="Marks").click()
        page.locator("#marks").get_by_text("Marked good").wait_for()
        page.reload()
        page.locator("#marks").get_by_text("Marked good").wait_for()
        page.close()


def test_green_says_nothing_else_than_the_rows_below_it(browser: Any, tmp_path: Path, package_file: Path) -> None:
    with station(tmp_path, package_file) as (opened, address):
        shown = drifting()
        higher = msgspec.structs.replace(shown.streams[0], rank=0.9)
        # Lower scores than those of models that had not seen the part are as learnt.
        lower = msgspec.structs.replace(shown.streams[1], rank=0.1, usual=(0.0, 0.6))
        off = [higher, lower, *shown.streams[2:]]
        state = msgspec.structs.replace(shown, streams=tuple(off), message="no change is sure yet")
        for watcher in opened._control.drift_watchers.values():
            watcher.status = lambda: state  # type: ignore[method-assign]
        judge(opened, part(0))
        page = browser.new_page()
        page.goto(f"{address}/#/health")
        page.locator("#drift-message.none").get_by_text("No change is sure yet.").wait_for()
        page.locator("#streams").get_by_text("higher, not yet sure").wait_for()
        assert page.locator("#streams .said").all_text_contents()[1] == "as learnt"
        page.close()


def test_models_of_the_fleet_in_a_browser(browser: Any, tmp_path: Path, package_file: Path) -> None:
    file = RunningModel(sha256="a" * 64, origin="file")
    release = RunningModel(sha256="b" * 64, origin="release", name="spring", release="r1", on_trial=True)
    found = Disagreement(parts=200, differing=3, newly_failed=1, newly_passed=2, share=0.015, upper=0.043)
    tried = CandidateModel(
        release="r2", sha256="c" * 64, name="summer", stage="shadow", done=200, total=500, disagreement=found
    )
    models = ProductModels(product="tile", present=file, candidate=tried)
    asked: list[str] = []

    class Fleet:
        def roll_back(self, name: str, *, to_file: bool) -> ProductModels:
            assert not to_file
            asked.append(name)
            return models

        def promote(self, name: str) -> ProductModels:
            raise NotImplementedError

        def allow_older(self, name: str) -> ProductModels:
            asked.append(f"older {name}")
            return models

        def status_of(self, name: str) -> ProductModels:
            return models

    with station(tmp_path, package_file) as (opened, address):
        opened._control.models = Fleet()
        judge(opened, part(0))
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("tab", name="Models").click()
        message = page.locator("#models-message")
        message.get_by_text("summer: shadow 200 of 500, 3 of 200 verdicts differ (at most 4.3 %)").wait_for()
        assert page.locator("#rollback").is_disabled()
        models = ProductModels(product="tile", present=release, previous=(file,))
        judge(opened, part(1))
        message.get_by_text("On trial: spring.").wait_for()
        page.locator("#order-token").fill(TOKEN)
        page.locator("#rollback").click()
        page.get_by_role("button", name="Sure?").click()
        page.locator("#done.good").get_by_text("tile: back to the model before.").wait_for()
        assert asked == ["tile"]
        assert page.locator("#allow-older").is_hidden()
        older = ReleaseOutcome(
            release="1" * 32, sha256="c" * 64, fate="refused", reason="older", detail="number 1", at=release.since
        )
        models = ProductModels(product="tile", present=file, outcomes=(older,))
        judge(opened, part(2))
        message.get_by_text("refused: number 1").wait_for()
        page.locator("#allow-older").click()
        page.get_by_role("button", name="Sure?").click()
        page.locator("#done.good").get_by_text("tile: the older model is taken up.").wait_for()
        assert asked == ["tile", "older tile"]
        page.close()


def test_the_page_says_when_the_daemon_is_gone(browser: Any, tmp_path: Path, package_file: Path) -> None:
    with station(tmp_path, package_file) as (_, address):
        page = browser.new_page()
        page.goto(address)
        page.get_by_text("live", exact=True).wait_for()
    page.get_by_text("connection lost, trying again").wait_for()
    page.close()


@contextlib.contextmanager
def forwarder(address: str) -> Iterator[tuple[str, threading.Event]]:
    """A way to the page that can fall silent while its connections stay open, as a tablet's Wi-Fi does."""
    host, port = address.removeprefix("http://").split(":")
    frozen, closing = threading.Event(), threading.Event()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while frozen.is_set() and not closing.is_set():
                    time.sleep(0.05)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        server.settimeout(0.2)

        def accept() -> None:
            while not closing.is_set():
                try:
                    outer, _ = server.accept()
                except (TimeoutError, OSError):
                    continue
                inner = socket.create_connection((host, int(port)))
                for one in (outer, inner):
                    one.settimeout(None)
                    stack.callback(one.close)
                for pair in ((outer, inner), (inner, outer)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", frozen
        finally:
            closing.set()
            thread.join()


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_a_silent_connection_is_not_taken_for_a_green_line(
    browser: Any, tmp_path: Path, package_file: Path, width: int, height: int
) -> None:
    with station(tmp_path, package_file) as (opened, address), forwarder(address) as (through, frozen):
        judge(opened, part(1))
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(through)
        page.get_by_text("live", exact=True).wait_for()
        assert page.evaluate("getComputedStyle(document.querySelector('main')).filter") == "none"
        frozen.set()
        page.get_by_text(re.compile(r"nothing heard for \d+ s")).wait_for(timeout=15_000)
        assert page.get_by_text("live", exact=True).count() == 0
        assert page.evaluate("getComputedStyle(document.querySelector('main')).filter") == "grayscale(1)"
        assert "nothing heard" in page.title()
        frozen.clear()
        page.get_by_text("live", exact=True).wait_for(timeout=30_000)
        assert page.evaluate("document.body.className") == ""
        page.close()
