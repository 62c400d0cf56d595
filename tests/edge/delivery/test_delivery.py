"""Delivery on real brokers and a real web server: outages, refusals, and SIGKILL at any moment."""

from __future__ import annotations

import contextlib
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from cli import cli
from edge.config.outputs import MqttConfig, OutboxConfig, RetryConfig, WebhookConfig
from edge.delivery.mqtt import MqttDestination
from edge.delivery.outbox import Delivery, Outbox
from edge.delivery.pipeline import Deliverer, Destination
from edge.delivery.webhook import WebhookDestination
from edge.status import CameraState, LineState
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, LinkError, StorageError
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ReceivedMessage
from edgeflame.mqtt.url import parse_broker_url
from edgeflame.state import locked_state_dir
from tests.support.brokers import BROKERS, BrokerProcess
from tests.support.inspection_results import body
from tests.support.small_package import write_images
from tests.support.waiting import wait_for

QUICK = RetryConfig(first_delay_s=0.05, max_delay_s=0.2, flush_s=5.0)
STATE = LineState(online=True, boot="b", product="tile", model="0" * 12, threshold=1.0, source="camera:0")


class Listener:
    """What a plant's system hears; survives the broker's restarts."""

    def __init__(self, url: str, *filters: str) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.is_up = threading.Event()
        self.link = MqttClient(
            parse_broker_url(url), client_id=f"listener-{id(self)}", filters=filters, sink=self._hear
        )
        self.link.start()

    def _hear(self, event: ClientEvent) -> None:
        if isinstance(event, Connected):
            self.is_up.set()
        if isinstance(event, ReceivedMessage):
            self.messages.append((event.topic, event.payload))
            event.acknowledge()

    def deliveries(self) -> list[Delivery]:
        return [msgspec.json.decode(payload, type=Delivery) for topic, payload in self.messages if "/result" in topic]

    def numbers(self) -> list[int]:
        return [delivery.number for delivery in self.deliveries()]


@contextlib.contextmanager
def listening(url: str, *filters: str) -> Iterator[Listener]:
    listener = Listener(url, *filters)
    try:
        assert listener.is_up.wait(30)
        yield listener
    finally:
        listener.link.close(flush_s=0.0)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.sqlite", OutboxConfig()) as opened:
        yield opened


def mqtt(broker: BrokerProcess, **keys: Any) -> MqttDestination:
    return MqttDestination(MqttConfig(broker=broker.url, fleet="f", line="l1", timeout_s=5.0, **keys), STATE)


def test_results_arrive_in_order_and_the_state_is_there_for_those_who_come_later(
    broker: BrokerProcess, outbox: Outbox
) -> None:
    with listening(broker.url, "edgeflame/v1/f/line/+/result") as plant:
        with Deliverer(outbox, mqtt(broker, home_assistant="homeassistant"), QUICK) as deliverer:
            for sequence in range(120):
                outbox.append([body(sequence)])
            wait_for(lambda: deliverer.status().waiting == 0, "all are acknowledged")
            with listening(broker.url, "edgeflame/v1/f/line/l1/state", "homeassistant/#") as late:
                wait_for(lambda: len(late.messages) == 3, "state and discovery are retained")
                told = dict(late.messages)
        wait_for(lambda: len(plant.messages) == 120, "all have arrived")
    assert plant.numbers() == list(range(1, 121))
    assert not any(delivery.redelivered for delivery in plant.deliveries())
    assert plant.deliveries()[7].read_result().sequence == 7
    assert msgspec.json.decode(told["edgeflame/v1/f/line/l1/state"], type=LineState) == STATE
    config = msgspec.json.decode(told["homeassistant/sensor/edgeflame_f_l1/verdict/config"])
    assert config["state_topic"] == "edgeflame/v1/f/line/l1/result"
    with listening(broker.url, "edgeflame/v1/f/line/l1/state") as later:
        wait_for(lambda: later.messages, "the state is retained")
        assert msgspec.json.decode(later.messages[0][1], type=LineState).online is False


AVAILABILITY, LINE_STATE = "edgeflame/v1/f/line/l1/availability", "edgeflame/v1/f/line/l1/state"


def retained(broker: BrokerProcess) -> tuple[str, bool]:
    """Availability and state, as somebody who comes now hears them."""
    with listening(broker.url, AVAILABILITY, LINE_STATE) as late:
        wait_for(lambda: len(dict(late.messages)) == 2, "both are retained")
        told = dict(late.messages)
    return told[AVAILABILITY].decode(), msgspec.json.decode(told[LINE_STATE], type=LineState).online


def test_availability_says_online_while_the_line_is_connected_and_offline_when_it_leaves(
    broker: BrokerProcess,
) -> None:
    destination = mqtt(broker)
    with listening(broker.url, AVAILABILITY) as plant:
        destination.idle()
        wait_for(lambda: plant.messages, "the line is announced")
        assert retained(broker) == ("online", True)
        # A connection that is made anew, by the broker's restart, says so again.
        broker.kill()
        plant.messages.clear()
        broker.start()

        def is_back() -> bool:
            with contextlib.suppress(LinkError):
                destination.idle()
            return (AVAILABILITY, b"online") in plant.messages

        wait_for(is_back, "the line is back")
    destination.close()
    wait_for(lambda: retained(broker) == ("offline", False), "it took its leave")


def test_lines_whose_names_join_to_the_same_text_stay_connected(broker: BrokerProcess, tmp_path: Path) -> None:
    """Of the fleet plant-a the line 1, and of the fleet plant the line a-1; and two daemons of one name."""
    names = [("plant-a", "1"), ("plant", "a-1"), ("plant", "a-1")]
    lines = [
        MqttDestination(
            MqttConfig(broker=broker.url, fleet=fleet, line=line, timeout_s=5.0),
            msgspec.structs.replace(STATE, boot=f"boot-{number}"),
        )
        for number, (fleet, line) in enumerate(names)
    ]
    with contextlib.ExitStack() as stack:
        outboxes = []
        for number, line in enumerate(lines):
            stack.callback(line.close)
            outboxes.append(stack.enter_context(Outbox(tmp_path / f"{number}.sqlite", OutboxConfig())))
            outboxes[-1].register("mqtt")
        sessions = [line._connected() for line in lines]
        for sequence in range(30):
            for line, outbox in zip(lines, outboxes, strict=True):
                outbox.append([body(sequence)])
                assert line.deliver(outbox.next_batch("mqtt", 1)) == sequence + 1
                outbox.acknowledge("mqtt", sequence + 1)
        assert [line._session for line in lines] == sessions, "none has connected again"


def test_a_last_will_that_comes_late_is_contradicted(broker: BrokerProcess) -> None:
    """That of a process that was killed comes when the broker misses it, long after the next one is there."""
    destination = mqtt(broker)
    destination.idle()
    late = msgspec.structs.replace(STATE, online=False, boot="the one before")
    with listening(broker.url, LINE_STATE, AVAILABILITY) as other:
        other.link.publish(LINE_STATE, msgspec.json.encode(late), retain=True)
        other.link.publish(AVAILABILITY, b"offline", retain=True)

        def is_online() -> bool:
            destination.idle()
            return retained(broker) == ("online", True)

        wait_for(lambda: (AVAILABILITY, b"offline") in other.messages, "the last will is there")
        wait_for(is_online, "the line is online again")
    destination.close()
    wait_for(lambda: retained(broker) == ("offline", False), "its own leave stays")


def test_entities_of_a_camera_that_was_taken_out_go(broker: BrokerProcess) -> None:
    def line(boot: str, *cameras: str) -> MqttDestination:
        state = msgspec.structs.replace(
            STATE,
            boot=boot,
            cameras=tuple(
                CameraState(name=name, product="tile", model="0" * 12, threshold=1.0, source="camera:0")
                for name in cameras
            ),
        )
        config = MqttConfig(broker=broker.url, fleet="f", line="l1", timeout_s=5.0, home_assistant="ha")
        return MqttDestination(config, state)

    def entities() -> set[str]:
        with listening(broker.url, "ha/#", LINE_STATE) as late:
            wait_for(lambda: LINE_STATE in dict(late.messages), "what is retained is there")
            return {topic.split("/")[3] for topic, _ in late.messages if topic.startswith("ha/")}

    with contextlib.closing(line("1", "a", "b", "c")) as before:
        before.idle()
        wait_for(lambda: len(entities()) == 6, "each has its entities")
        before.set_state(msgspec.structs.replace(before._state, cameras=before._state.cameras[:2]))
        before.idle()
        wait_for(lambda: entities() == {"a_verdict", "a_score", "b_verdict", "b_score"}, "taken out while it runs")
    with contextlib.closing(line("2", "a")) as after:

        def is_cleared() -> bool:
            after.idle()
            return entities() == {"verdict", "score"}

        wait_for(is_cleared, "taken out between two runs")


_LINE = """
import sys, time
from edge.config.outputs import MqttConfig
from edge.delivery.mqtt import MqttDestination
from edge.status import CameraState, LineState
state = LineState(online=True, boot="b", product="tile", model="0" * 12, threshold=1.0, source="camera:0")
MqttDestination(MqttConfig(broker=sys.argv[1], fleet="f", line="l1"), state).idle()
time.sleep(600)
"""


def test_the_broker_says_offline_for_a_line_that_is_killed(broker: BrokerProcess) -> None:
    line = subprocess.Popen([sys.executable, "-c", _LINE, broker.url])
    try:
        wait_for(lambda: retained(broker) == ("online", True), "the line is announced")
    finally:
        line.kill()
        line.wait()
    wait_for(lambda: retained(broker) == ("offline", False), "the last wills are published")


def test_an_outage_of_the_broker_loses_nothing_and_marks_what_may_come_twice(
    broker: BrokerProcess, outbox: Outbox
) -> None:
    rng = random.Random(3)
    with (
        listening(broker.url, "edgeflame/v1/f/line/+/result") as plant,
        Deliverer(outbox, mqtt(broker), QUICK) as deliverer,
    ):
        for start in (0, 100, 200):
            kill_at = start + rng.randrange(20, 80)
            for sequence in range(start, start + 100):
                outbox.append([body(sequence)])
                if sequence == kill_at:
                    plant.is_up.clear()
                    broker.kill()
            broker.start()
            assert plant.is_up.wait(30)
        wait_for(lambda: deliverer.status().waiting == 0, "all are acknowledged")
        assert deliverer.num_failures > 0
    # What a broker had acknowledged and not yet passed on when it was killed is gone with it: QoS 1 to a broker
    # without persistence promises no more. The outbox knows of every number, and the receiver sees the gap.
    firsts = [delivery.number for delivery in plant.deliveries() if not delivery.redelivered]
    assert len(firsts) == len(set(firsts))
    assert outbox.status("mqtt").acknowledged == 300


class Service(http.server.BaseHTTPRequestHandler):
    """A web service that may be told to fail."""

    protocol_version = "HTTP/1.1"
    answers: list[int]
    taken: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.answers.pop(0) if self.answers else 204
        if status == 0:  # takes it and dies before the answer
            self.taken.append((self.headers["Idempotency-Key"], msgspec.json.decode(data)))
            self.close_connection = True
            self.connection.close()
            return
        if status < 300:
            self.taken.append((self.headers["Idempotency-Key"], msgspec.json.decode(data)))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


@contextlib.contextmanager
def web_service(*answers: int) -> Iterator[tuple[str, type[Service]]]:
    handler = type("Handler", (Service,), {"answers": list(answers), "taken": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hook?line=1", handler
        finally:
            server.shutdown()
            thread.join()


def test_a_web_service_gets_each_once_in_order_whatever_it_answers_at_first(outbox: Outbox) -> None:
    with web_service(500, 204, 0, 404, 204) as (url, service):
        destination = WebhookDestination(WebhookConfig(url=url, verdicts=("fail",), timeout_s=5.0))
        with Deliverer(outbox, destination, QUICK) as deliverer:
            for sequence in range(10):
                outbox.append([body(sequence, "fail" if sequence % 2 else "pass")])
            wait_for(lambda: deliverer.status().waiting == 0, "all are acknowledged")
            assert deliverer.last_error is None
    keys = [key for key, _ in service.taken]
    once = list(dict.fromkeys(keys))
    assert once == [f"{outbox.id}-{number}" for number in (2, 4, 6, 8, 10)]
    # The one whose answer was lost comes again, under the same key and marked.
    assert len(keys) == 6
    (twice,) = [key for key in once if keys.count(key) == 2]
    assert [item["redelivered"] for key, item in service.taken if key == twice][1] is True


def test_a_service_that_is_away_gets_its_results_after_the_next_start(tmp_path: Path) -> None:
    gone = WebhookConfig(url="http://127.0.0.1:9/", timeout_s=1.0)
    hasty = RetryConfig(first_delay_s=0.05, max_delay_s=0.1, flush_s=0.2)
    with Outbox(tmp_path / "o.sqlite", OutboxConfig()) as outbox:
        with Deliverer(outbox, WebhookDestination(gone), hasty) as deliverer:
            outbox.append([body(0), body(1)])
            wait_for(lambda: deliverer.last_error, "the first attempt has failed")
            assert "http://127.0.0.1:9: " in str(deliverer.last_error)
        assert outbox.status("webhook").waiting == 2
    with (
        web_service() as (url, service),
        Outbox(tmp_path / "o.sqlite", OutboxConfig()) as outbox,
        Deliverer(outbox, WebhookDestination(WebhookConfig(url=url)), QUICK) as deliverer,
    ):
        wait_for(lambda: deliverer.status().waiting == 0, "both are acknowledged")
    assert [item["number"] for _, item in service.taken] == [1, 2]


def test_a_destination_that_raises_says_so_and_is_tried_again(outbox: Outbox) -> None:
    class Moody:
        name, max_batch, calls = "moody", 10, 0

        def deliver(self, deliveries: list[Delivery]) -> int:
            self.calls += 1
            if self.calls < 3:
                raise LinkError("not today")
            return deliveries[0].number  # one at a time, whatever it is given

        def idle(self) -> None: ...

        def close(self) -> None: ...

    moody: Destination = Moody()  # type: ignore[assignment]
    with Deliverer(outbox, moody, QUICK) as deliverer:
        outbox.append([body(n) for n in range(5)])
        wait_for(lambda: deliverer.status().acknowledged == 5, "all five are through")
    assert deliverer.num_failures == 2


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="mqtt: fleet name 'a/b'"):
        MqttConfig(broker="h", fleet="a/b", line="l")
    with pytest.raises(ConfigError, match="wildcards"):
        parse_config(b"", MqttConfig, "mqtt", {"broker": "h", "fleet": "f", "line": "l", "home_assistant": "x/#"})
    with pytest.raises(ConfigError, match="mqtt: broker 'ftp://h'"):
        MqttDestination(MqttConfig(broker="ftp://h", fleet="f", line="l"), STATE)
    with pytest.raises(ConfigError, match=r"mqtt: cannot use the TLS files /nowhere\.pem"):
        MqttDestination(MqttConfig(broker="mqtts://h", fleet="f", line="l", ca="/nowhere.pem"), STATE)
    with pytest.raises(ConfigError, match=r"webhook\.url"):
        WebhookConfig(url="http://user:secret@h/")
    with pytest.raises(ConfigError, match=r"webhook\.ca"):
        WebhookDestination(WebhookConfig(url="https://h/", ca="/nowhere.pem"))
    with pytest.raises(ConfigError, match="first_delay_s"):
        parse_config(b"", RetryConfig, "retry", {"first_delay_s": 0})


def inspect(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)


def test_inspect_delivers_and_says_what_waits(package_file: Path, tmp_path: Path) -> None:
    folder, config, state = write_images(tmp_path / "photos"), tmp_path / "line.toml", tmp_path / "state"
    common = ("--model", package_file, "--source", folder, "--config", config)
    config.write_text('[webhook]\nurl = "http://127.0.0.1:9/"\n[retry]\nflush_s = 0.1\n')
    with pytest.raises(ConfigError, match="need --state DIR"):
        inspect(*common)
    away = inspect(*common, "--state", state)
    assert away.exit_code == 0
    assert "5 results wait for webhook" in away.stdout
    with web_service() as (url, service):
        config.write_text(f'[webhook]\nurl = "{url}"\n')
        there = inspect(*common, "--state", state)
    assert "wait for" not in there.stdout
    assert [item["number"] for _, item in service.taken] == list(range(1, 11))
    with locked_state_dir(state), pytest.raises(StorageError, match="in use by another process"):
        inspect(*common, "--state", state)


KILLS = int(os.environ.get("EDGEFLAME_KILL_ROUNDS", "4"))


@pytest.mark.parametrize("kind", BROKERS)
@pytest.mark.timeout(60 + 15 * KILLS)
def test_killed_at_random_moments_what_arrived_and_what_waits_is_everything(
    kind: str, package_file: Path, tmp_path: Path
) -> None:
    """The daemon is killed again and again; no verdict that was shown is missing in the end, and no number is."""
    rng = random.Random(7)
    config, state = tmp_path / "line.toml", tmp_path / "state"
    shown: list[tuple[str, int]] = []  # when it was captured, and its sequence number: unique
    with BrokerProcess(kind, tmp_path) as broker, listening(broker.url, "edgeflame/v1/f/line/l1/result") as plant:
        config.write_text(f'[mqtt]\nbroker = "{broker.url}"\nfleet = "f"\nline = "l1"\n[retry]\nfirst_delay_s = 0.05\n')
        command = [
            sys.executable, "-m", "edgeflame", "inspect", "--model", str(package_file), "--state", str(state),
            "--source", "boards:warm_white_grid?size=128&parts=100000", "--config", str(config), "--json",
            "--threads", "1",
        ]  # fmt: skip
        for _ in range(KILLS):
            daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert daemon.stdout is not None
            lines = [daemon.stdout.readline()]
            until = time.monotonic() + rng.uniform(0.0, 0.6)
            while time.monotonic() < until:
                lines.append(daemon.stdout.readline())
            daemon.send_signal(signal.SIGKILL)
            lines += daemon.stdout.read().splitlines(keepends=True)
            daemon.stdout.close()
            daemon.wait()
            results = [msgspec.json.decode(line) for line in lines if line.endswith(b"\n")]
            shown += [(result["captured"], result["sequence"]) for result in results]
        last = subprocess.run([*command, "--limit", "3"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
        assert last.returncode == 0
        with Outbox(state / "outbox.sqlite", OutboxConfig()) as outbox:
            newest = outbox.latest(1)[0][0]
            assert outbox.status("mqtt").waiting == 0
        wait_for(lambda: newest in plant.numbers(), "the last result has arrived")
        deliveries = plant.deliveries()
    assert {delivery.number for delivery in deliveries} == set(range(1, newest + 1))
    firsts = [delivery.number for delivery in deliveries if not delivery.redelivered]
    assert len(firsts) == len(set(firsts))
    arrived = {(item["captured"], item["sequence"]) for item in (msgspec.json.decode(d.result) for d in deliveries)}
    assert set(shown) <= arrived
    assert len(shown) > KILLS
