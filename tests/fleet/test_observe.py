"""What a fleet shows of itself while it runs: status, tags for SCADA, metrics, and the report afterwards."""

from __future__ import annotations

import io
import json
import logging
import queue
import re
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from aggregator.config import AggregateConfig
from aggregator.events import (
    InitialModelAccepted,
    ModelAggregated,
    RoundClosed,
    RoundStarted,
    RunEnded,
    RunStarted,
    RunState,
    SiteFinished,
    SiteJoined,
    UpdateAccepted,
    UpdateRefused,
    apply_event,
    initial_state,
)
from aggregator.metrics import RunStatus, prometheus_metrics, run_summary, status_tags
from cli import cli
from cli.pages.fleet_report import render_run_page
from edgeflame.errors import DataError, EdgeFlameError, LinkError, UsageError
from edgeflame.log import EventLog, configure_logging
from edgeflame.methods import Learning
from edgeflame.metrics import Metric, MetricsServer
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, ReceivedMessage
from edgeflame.mqtt.messages import (
    BlobManifest,
    BlobNeed,
    Heartbeat,
    Message,
    Offer,
    Presence,
    Refusal,
    RoundState,
    TaskFailed,
    encode_message,
)
from edgeflame.mqtt.topics import Topics
from edgeflame.mqtt.url import parse_broker_url
from fleet.observe import FleetView
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet, Process
from tests.support.paths import REPOSITORY
from tests.support.ports import free_port
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(90)

RUN, SHA = "0" * 32, "a" * 64
TOPICS = Topics(fleet="test")
BASE = BlobManifest(sha256=SHA, size_bytes=4000, chunk_bytes=1000, crc32s=bytes(16))


def scraped(url: str) -> dict[str, float]:
    """Every sample of a page of metrics by its name with labels."""
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def test_a_run_can_be_watched(embedded: BrokerProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    heard: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    ports = [free_port(), free_port()]
    pages = [f"http://127.0.0.1:{port}/metrics" for port in ports]
    with (
        MqttClient(parse_broker_url(embedded.url), client_id="scada", filters=[TOPICS.status("+")], sink=heard.put),
        Fleet(embedded, tmp_path) as fleet,
    ):
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "1", "--metrics", f"127.0.0.1:{ports[0]}")
        site = fleet.site("a", "--metrics", f":{ports[1]}", TINY_GATE=str(gate))
        fleet.site("b")
        wait_for((gate / "waiting-a-1").exists, "a trains")
        wait_for(lambda: scraped(pages[0]).get('edgeflame_aggregator_sites{state="accepted"}') == 1, "b's update came")
        shown = scraped(pages[0])
        assert shown['edgeflame_aggregator_phase{phase="train"}'] == 1
        assert shown["edgeflame_aggregator_sites_online"] == 2
        assert shown['edgeflame_aggregator_sites{state="working"}'] == 1
        assert shown["edgeflame_aggregator_received_bytes_total"] > 1000
        assert shown["edgeflame_aggregator_state_free_bytes"] > 0
        assert shown["edgeflame_aggregator_updates_accepted_total"] == 1
        assert shown['edgeflame_aggregator_uploads_refused_total{reason="norm"}'] == 0
        wait_for(lambda: scraped(pages[1]).get("edgeflame_site_steps") == 5, "a shows its training")
        shown = scraped(pages[1])
        assert shown['edgeflame_site_activity{activity="train"}'] == 1
        # The second step may come too soon after the first to be told.
        assert shown["edgeflame_site_step"] in (1, 2)
        assert shown["edgeflame_site_welcome"] == 1
        documented = (REPOSITORY / "docs" / "fleet.md").read_text()
        for name in {re.sub(r"\{.*", "", name) for page in pages for name in scraped(page)}:
            assert f"`{name}`" in documented, name

        status = Process("status", tmp_path, ["fleet", "status", *_at(embedded), "--json"], {})
        table = Process("table", tmp_path, ["fleet", "status", *_at(embedded)], {})
        watch = Process("watch", tmp_path, ["fleet", "status", *_at(embedded), "--watch"], {})
        assert [status.wait(), table.wait()] == [0, 0]
        seen = json.loads(status.out.read_text())
        assert (seen["phase"], seen["round"], seen["num_rounds"], seen["aggregator_online"]) == ("train", 1, 1, True)
        (first, second) = seen["sites"]
        assert (first["site"], first["link"], first["activity"]) == ("a", "online", "train")
        assert (first["step"] in (1, 2), first["num_steps"]) == (True, 5)
        assert (second["link"], second["error"]) == ("online", None)
        assert re.search(r"a +online +yes +trains +[12]/5", table.out.read_text())
        wait_for(lambda: "round 1 of 1" in watch.out.read_text(), "the watch has begun")
        (gate / "go").touch()
        assert [aggregator.wait(), site.wait()] == [0, 0]
        assert watch.wait() == 0
        assert "finished after 1 round" in watch.out.read_text().splitlines()[-1]

        told: dict[str, list[str]] = {}
        while not heard.empty():
            event = heard.get()
            if isinstance(event, ReceivedMessage):
                event.acknowledge()
                told.setdefault(event.topic.rpartition("/")[2], []).append(event.payload.decode())
        assert told["phase"][-1] == "done"
        assert "train" in told["phase"]
        assert told["rounds_done"][-1] == "1"
        assert told["error"] == [""]
        assert len(told["run"]) == 1, "only changes are said"
        protocol = (REPOSITORY / "docs" / "protocol.md").read_text()
        for name in told:
            assert f"`{name}`" in protocol, name


def _at(broker: BrokerProcess) -> list[str]:
    return ["--broker", broker.url, "--fleet", "test"]


def test_a_fleet_nobody_spoke_of_is_an_answer_and_not_silence(embedded: BrokerProcess, tmp_path: Path) -> None:
    process = Process("status", tmp_path, ["fleet", "status", *_at(embedded)], {})
    assert process.wait() == 1
    assert "nothing was ever said about this fleet" in process.log.rstrip().splitlines()[-1]


def view_of(*said: tuple[str, Message, float]) -> FleetView:
    view = FleetView(TOPICS)
    for topic, message, now in said:
        view.handle_message(topic, encode_message(message), now)
    return view


def beat(activity: str, step: int, num_steps: int = 10, **more: object) -> Heartbeat:
    return Heartbeat(boot=RUN, activity=activity, round=1, step=step, num_steps=num_steps, **more)  # type: ignore[arg-type]


def test_rates_come_from_heartbeats() -> None:
    up = TOPICS.site_up("a")
    view = view_of((up, beat("train", 0), 0.0), (up, beat("train", 4), 2.0))
    assert view.sites["a"].steps_per_s == 2.0
    view.handle_message(up, encode_message(beat("train", 8)), 3.0)
    assert view.sites["a"].steps_per_s == 3.0
    view.handle_message(up, encode_message(beat("offerupdate", 0)), 4.0)
    assert view.sites["a"].steps_per_s == 0.0
    offer = Offer(run=RUN, purpose="update", round=1, manifest=BASE)
    view.handle_message(up, encode_message(offer), 4.5)
    view.handle_message(up, encode_message(beat("offerupdate", 5)), 5.5)
    assert view.sites["a"].bytes_per_s == 5000.0


def test_what_went_wrong_stays_visible() -> None:
    view = view_of(
        (TOPICS.site_presence("a"), Presence(boot=RUN, online=True), 0.0),
        (TOPICS.site_up("a"), beat("train", 1, paused="shift"), 1.0),
        (TOPICS.site_down("a"), Refusal(run=RUN, purpose="update", round=2, reason="norm", detail="far"), 1.0),
        (TOPICS.site_up("b"), TaskFailed(run=RUN, purpose="update", round=2, detail="no images"), 1.0),
        (TOPICS.site_down("d"), BlobNeed(sha256=SHA, missing=b"\0"), 1.0),
        (TOPICS.site_presence("c"), Presence(boot=RUN, online=False), 1.0),
        (TOPICS.round, RoundState(run=RUN, phase="failed", detail="quorum missed", base=BASE), 1.0),
    )
    view.handle_message(TOPICS.site_up("d"), b"{", 1.0)
    view.handle_message("edgeflame/v1/other/round", b"{", 1.0)
    assert view.sites["a"].error == "update 2 refused: norm (far)"
    assert view.sites["a"].activity_text == "is paused: shift"
    assert view.sites["b"].error == "update 2: no images"
    assert [site.link(10.0) for site in (view.sites["a"], view.sites["c"])] == ["silent 9 s", "offline"]
    assert view.num_unreadable == 1
    assert view.problem() == "the run failed: quorum missed"
    assert view_of((TOPICS.round, RoundState(run=RUN, phase="train"), 0.0)).problem() is not None
    assert view_of((TOPICS.round, RoundState(run=RUN, phase="done"), 0.0)).problem() is None
    data = view.as_data(10.0)
    assert [site["site"] for site in data["sites"]] == ["a", "b", "c", "d"]
    assert msgspec.json.encode(data)


def run_state(*, is_closed: bool = True) -> RunState:
    state = initial_state(RunStarted(run=RUN, config=AggregateConfig(rounds=3), time="2030-01-01T00:00:00Z"))
    joined = [SiteJoined(site=site, install=site, initial=SHA) for site in "abcd"]
    facts = [
        *joined,
        InitialModelAccepted(site="a", sha256=SHA, size_bytes=10),
        RoundStarted(round=1, asked=("a", "b", "c")),
        UpdateAccepted(
            round=1, site="a", sha256=SHA, num_samples=30, metrics={"loss": 0.5, "<b>": 1.0}, relative_change=0.1
        ),
        UpdateAccepted(round=1, site="c", sha256=SHA, num_samples=10, metrics={"loss": 1.5}, relative_change=0.2),
        UpdateRefused(round=1, site="b", sha256=SHA, reason="norm", detail="<script>alert(1)</script>"),
        *([RoundClosed(round=1, left_out=())] if is_closed else []),
    ]
    for fact in facts:
        state = apply_event(state, fact)
    return state


def snapshot(state: RunState) -> RunStatus:
    return RunStatus(
        state=state, num_online=3, phase_s=5.0, last_round_s=None, progress_age_s=1.0, progress_at=1234567.8,
        is_connected=True, bytes_in=10, bytes_out=20, free_bytes=30,
    )  # fmt: skip


def test_tags_and_metrics_say_what_the_facts_say() -> None:
    shot = snapshot(run_state())
    said = status_tags(shot)
    assert (said["phase"], said["round"], said["rounds"], said["sites"]) == ("train", "1", "3", "4")
    assert (said["sites_accepted"], said["sites_refused"], said["sites_working"]) == ("2", "1", "0")
    assert said["last_progress"] == "1234560"
    by_name = {metric.name: metric for metric in prometheus_metrics(shot)}
    refusals = by_name["edgeflame_aggregator_uploads_refused"]
    assert (refusals.kind, {name: count for name, count in refusals.values.items() if count}) == (
        "counter",
        {"norm": 1},
    )
    assert by_name["edgeflame_aggregator_updates_accepted"].value == 2
    assert dict(by_name["edgeflame_aggregator_refusals"].values) == {"norm": 1}, "the name before"
    assert by_name["edgeflame_aggregator_sites"].values["idle"] == 1
    assert sum(by_name["edgeflame_aggregator_sites"].values.values()) == 4
    assert sum(by_name["edgeflame_aggregator_phase"].values.values()) == 1
    failed = apply_event(run_state(), RunEnded(succeeded=False, reason="quorum missed"))
    assert status_tags(snapshot(failed))["error"] == "quorum missed"


def test_a_count_of_refusals_does_not_fall_when_a_better_update_is_accepted() -> None:
    state = run_state(is_closed=False)
    better = UpdateAccepted(round=1, site="b", sha256=SHA, num_samples=30, metrics={}, relative_change=0.1)
    by_name = {metric.name: metric for metric in prometheus_metrics(snapshot(apply_event(state, better)))}
    assert by_name["edgeflame_aggregator_uploads_refused"].values["norm"] == 1
    assert by_name["edgeflame_aggregator_updates_accepted"].value == 3


def test_a_terminal_is_told_what_the_round_waits_for() -> None:
    waiting = initial_state(RunStarted(run=RUN, config=AggregateConfig(), time="now"))
    assert run_summary(waiting, num_online=2) == "waiting: 0 ready; 2 online"
    assert run_summary(run_state(), num_online=3) == "train: 2 of 3 in, 1 refused; 3 online"


def test_log_lines_go_where_standard_error_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar takes its place to stay below them."""
    logger = logging.getLogger("edgeflame")
    before = list(logger.handlers)
    try:
        configure_logging(log_format="text", verbosity=0)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        EventLog("test").info("something", figure=1.5)
        assert sys.stderr.getvalue().endswith("info    something figure=1.5\n")  # type: ignore[attr-defined]
    finally:
        logger.handlers[:] = before


def test_metrics_are_served_while_they_are_wanted() -> None:
    with MetricsServer("127.0.0.1:0") as server:
        counter = Metric(name="x_bytes", meaning="m", kind="counter", value=3)
        server.show([counter, Metric(name="y", meaning="m", label="l", values={'a"b\n': 1.5})])
        assert scraped(server.url) == {"x_bytes_total": 3.0, 'y{l="a\\"b\\n"}': 1.5}
        taken = server.url.split("/")[2]
        with pytest.raises(LinkError, match="cannot listen there"):
            MetricsServer(taken)
    with pytest.raises(OSError, match="refused"):
        scraped(server.url)


@pytest.mark.parametrize("address", ["", "9464", "host:", "host:x", "h:99999", "h:-1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        MetricsServer(address)


def page_of(state: RunState) -> str:
    from aggregator.ledger import build_ledger

    # As a reader of the file has it.
    return render_run_page(msgspec.json.decode(msgspec.json.encode(build_ledger(state))))


def test_the_report_shows_weights_reasons_and_curves_and_runs_nothing() -> None:
    page = page_of(run_state())
    assert "75.0%" in page
    assert "<title>c, round 1: 1.5</title>" in page
    assert "<title>mean of the sites, round 1: 1</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page), "it loads nothing"


def trained_for_two_rounds() -> RunState:
    """FLAME: FADE alone in the first round, and the distillation with it in the second."""
    state = initial_state(RunStarted(run=RUN, config=AggregateConfig(), time="2030-01-01T00:00:00Z"))
    facts = [
        *(SiteJoined(site=site, install=site, initial=SHA) for site in "ab"),
        InitialModelAccepted(site="a", sha256=SHA, size_bytes=10),
    ]
    first = {"loss": 0.9, "separated": 0.5, "num_forward": 40.0}
    second = {"loss": 1.2, "fade": 0.8, "distillation": 0.7, "separated": 0.6, "num_forward": 40.0}
    for number, metrics in ((1, first), (2, second)):
        facts.append(RoundStarted(round=number, asked=("a", "b")))
        facts += [
            UpdateAccepted(round=number, site=site, sha256=SHA, num_samples=9, metrics=metrics, relative_change=0.1)
            for site in "ab"
        ]
        facts += [
            RoundClosed(round=number, left_out=()),
            ModelAggregated(round=number, sha256=SHA, size_bytes=10),
        ]
    for fact in facts:
        state = apply_event(state, fact)
    return state


def test_the_report_says_why_a_loss_rises_and_leaves_internals_out() -> None:
    page = page_of(trained_for_two_rounds())
    assert "another term joins the loss: distillation (from round 2)" in page
    assert "forward" not in page
    # The first round's loss is FADE's alone, so the line of FADE begins there; one dot of a term is no chart.
    assert "<title>a, round 1: 0.9</title>" in page.split("<h3>fade</h3>")[1]
    assert "<h3>distillation</h3>" not in page
    assert "distillation 0.7" in page
    assert "another term" not in page_of(run_state())


def learnt_from_marks(*, is_over: bool = True) -> RunState:
    """Two sites have marked parts; the head counts at one of them and at the one that has not."""
    learning = Learning(method="feedback")
    state = initial_state(RunStarted(run=RUN, config=AggregateConfig(rounds=1, learning=learning), time="2030-01-01"))
    reported = {"a": (12.0, 2.0), "b": (3.0, 0.0), "c": (0.0, 0.0)}
    facts = [
        *(SiteJoined(site=site, install=site, initial=SHA) for site in reported),
        InitialModelAccepted(site="a", sha256=SHA, size_bytes=10),
        RoundStarted(round=1, asked=tuple(reported)),
        *(
            UpdateAccepted(
                round=1, site=site, sha256=SHA, num_samples=9, relative_change=0.1,
                metrics={"loss": 0.7, "num_marked_bad": marked, "num_marks_left_out": left_out},
            )
            for site, (marked, left_out) in reported.items()
        ),
        RoundClosed(round=1, left_out=()),
        ModelAggregated(round=1, sha256=SHA, size_bytes=10),
    ]  # fmt: skip
    if is_over:
        said: dict[str, dict[str, float | str]] = {
            "a": {"num_marked_bad": 12.0, "num_marks_left_out": 2.0, "head_weight": 1.0},
            "b": {"num_marked_bad": 3.0, "head_weight": 0.0, "no_head": "it calls 62% of the good <i>bad</i>"},
            # Whatever it is that this site says.
            "c": {"num_marked_bad": "many", "head_weight": 0.5},
        }
        facts += [SiteFinished(site=site, package=SHA, summary=summary) for site, summary in said.items()]
        facts.append(RunEnded(succeeded=True, reason=""))
    for fact in facts:
        state = apply_event(state, fact)
    return state


def test_the_report_says_where_a_head_learnt_from_marks_counts_and_why_not_elsewhere() -> None:
    page = page_of(learnt_from_marks())
    assert (
        "<p>2 of 3 sites have marked bad parts: 15 photographs. 2 marks were left out; the packages say why. "
        "The head counts at 2 of 3 sites. Not at b: it calls 62% of the good &lt;i&gt;bad&lt;/i&gt;.</p>"
    ) in page
    assert "tells the site&#39;s marked parts from its good ones" in page
    assert "photographs marked bad</th>" in page
    running = page_of(learnt_from_marks(is_over=False))
    assert "<p>2 of 3 sites have marked bad parts: 15 photographs. 2 marks were left out" in running
    assert "The head counts" not in running
    assert "marked" not in page_of(run_state())


def test_metrics_say_what_was_marked_and_where_the_head_counts() -> None:
    by_name = {metric.name: metric for metric in prometheus_metrics(snapshot(learnt_from_marks()))}
    assert by_name["edgeflame_aggregator_marks_used"].values == {"a": 12, "b": 3, "c": 0}
    assert by_name["edgeflame_aggregator_marks_left_out"].values == {"a": 2, "b": 0, "c": 0}
    assert by_name["edgeflame_aggregator_head_weight"].values == {"a": 1, "b": 0, "c": 0.5}
    assert not {m.name: m for m in prometheus_metrics(snapshot(run_state()))}["edgeflame_aggregator_marks_used"].values


def test_after_a_good_end_nobody_is_missing() -> None:
    from cli.fleet_run import _line

    gone = Presence(boot=RUN, online=False)
    done = RoundState(run=RUN, phase="done", round=2, num_rounds=2, base=BASE)
    left = (TOPICS.aggregator_presence, gone, 0.0)
    view = view_of((TOPICS.round, done, 0.0), left, (TOPICS.site_presence("a"), gone, 0.0))
    assert _line(view) == f"run {RUN[:8]}: finished after 2 rounds"
    failed = RoundState(run=RUN, phase="failed", round=1, num_rounds=2, detail="quorum missed")
    assert _line(view_of((TOPICS.round, failed, 0.0))).startswith(f"run {RUN[:8]}: FAILED in round 1 of 2")
    running = RoundState(run=RUN, phase="train", round=1, num_rounds=2)
    assert "aggregator OFFLINE" in _line(view_of((TOPICS.round, running, 0.0), left))


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_run_at_any_point_has_a_report(is_closed: bool) -> None:
    assert "no round has begun" in page_of(initial_state(RunStarted(run=RUN, config=AggregateConfig(), time="now")))
    assert "norm" in page_of(run_state(is_closed=is_closed))


def report(*arguments: object) -> EdgeFlameError:
    result = CliRunner().invoke(cli, ["fleet", "report", *map(str, arguments)])
    assert isinstance(result.exception, EdgeFlameError), result.output
    return result.exception


def test_what_is_no_run_has_no_report(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    (tmp_path / "bad.json").write_text('{"rounds": []}')
    assert "exactly one of them" in str(report("--out", out))
    assert "no journal here" in str(report("--state", tmp_path, "--out", out))
    assert not (tmp_path / "journal.sqlite").exists()
    error = report("--ledger", tmp_path / "bad.json", "--out", out)
    assert isinstance(error, DataError)
    assert "not a ledger" in str(error)
    assert not out.exists()
