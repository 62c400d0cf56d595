"""Who may do what on a real Mosquitto with the configuration that ``fleet init`` writes: and who may not."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import cli
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ConnectionFailed, ReceivedMessage
from edgeflame.mqtt.kit import read_kit
from edgeflame.mqtt.url import BrokerUrl, TlsFiles, TlsPem, parse_broker_url
from fleet import broker_control
from fleet.broker_control import BrokerControl
from fleet.certificates import IssuedCertificate, issue_certificate, make_authority
from fleet.folder import FleetFolder, make_fleet, open_fleet
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import REPOSITORY
from tests.support.ports import free_port
from tests.support.publishing import published
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(90)

BASE = "edgeflame/v1/test"


@dataclass
class Plant:
    """A fleet's folder, and its broker."""

    folder: Path
    broker: BrokerProcess

    @property
    def kits(self) -> Path:
        return self.folder / "kits"

    def url(self, name: str) -> BrokerUrl:
        return read_kit(self.kits / f"{name}.kit").broker_url()

    def authority(self) -> IssuedCertificate:
        with open_fleet(self.folder) as fleet:
            return fleet._authority()

    def presented(self, issued: IssuedCertificate, authority: IssuedCertificate | None = None) -> BrokerUrl:
        """Somebody with another certificate who knows the address."""
        ca = (authority or self.authority()).cert.decode()
        pem = TlsPem(ca=ca, cert=issued.cert.decode(), key=issued.key.decode(), name="stranger")
        return parse_broker_url(f"mqtts://localhost:{self.broker.port}", tls=pem)


def make_plant(folder: Path, *sites: str) -> FleetFolder:
    made = make_fleet(
        folder,
        fleet="test",
        hosts=["localhost", "127.0.0.1"],
        port=free_port(),
        bind="127.0.0.1",
        install_dir=None,
        plugin=None,
        broker_user="root" if os.getuid() == 0 else None,
        replace=False,
    )
    with open_fleet(folder) as fleet:
        for site in sites:
            fleet.enrol(site, role="site", days=10, out=None, reinstate=False)
        fleet.enrol("watcher", role="observer", days=10, out=None, reinstate=False)
        fleet.enrol("line-1", role="line", days=10, out=None, reinstate=False)
        fleet.enrol("engineer", role="publisher", days=10, out=None, reinstate=False)
        fleet.enrol("foreman", role="operator", days=10, out=None, reinstate=False)
        fleet.write_access()
    return made


def start(folder: Path, port: int) -> BrokerProcess:
    return BrokerProcess("mosquitto", folder, config=folder / "broker" / broker_control.CONFIG_FILE, port=port)


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    folder = tmp_path_factory.mktemp("plant") / "fleet"
    made = make_plant(folder, "a", "b")
    with start(folder, made.registry.port) as broker:
        yield Plant(folder, broker)


class Client:
    """A connection and what came over it; a context manager that waits until it is up or refused."""

    def __init__(self, url: BrokerUrl, *filters: str, connect_timeout_s: float = 3.0) -> None:
        self.events: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
        self.link = MqttClient(
            url,
            client_id=f"test-{os.urandom(6).hex()}",
            filters=filters or [f"{BASE}/round"],
            sink=self.events.put,
            connect_timeout_s=connect_timeout_s,
        )
        self.link.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    @property
    def refusal(self) -> str:
        event = self.events.get(timeout=30)
        assert isinstance(event, ConnectionFailed), event
        return str(event.error)

    def up(self) -> Client:
        event = self.events.get(timeout=30)
        assert isinstance(event, Connected), event
        return self

    def message(self) -> tuple[str, bytes]:
        """The next that a test sent; not what an earlier run left behind."""
        while True:
            event = self.events.get(timeout=30)
            assert isinstance(event, ReceivedMessage), event
            event.acknowledge()
            if event.payload in (b"forged", b"rightly"):
                return event.topic, event.payload


def refusal_of(url: BrokerUrl, *filters: str, connect_timeout_s: float = 3.0) -> str:
    with Client(url, *filters, connect_timeout_s=connect_timeout_s) as client:
        return client.refusal


def test_a_whole_run_over_mutual_tls(plant: Plant, tmp_path: Path, undisturbed_model: bytes) -> None:
    with Fleet(plant.broker, tmp_path, kits=plant.kits) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        sites = [fleet.site("a"), fleet.site("b")]
        assert [process.wait() for process in (aggregator, *sites)] == [0, 0, 0]
        assert fleet.model() == undisturbed_model, "the same as without TLS"
        assert all(word not in process.log for process in fleet.processes for word in ("_refused", "error "))


def test_a_line_fetches_a_released_package_with_its_kit(plant: Plant, signed: Path, tmp_path: Path) -> None:
    out = tmp_path / "got.edgeflame"
    with published(signed, "--kit", plant.kits / "engineer.kit"):
        done = edgeflame("model", "fetch", "test piece", "--out", out, "--kit", plant.kits / "line-1.kit")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == signed.read_bytes()


def test_a_certificate_of_another_authority_is_refused(plant: Plant) -> None:
    now = datetime.now(timezone.utc)
    other = make_authority("test", now=now)
    stranger = issue_certificate(other, name="a", fleet="test", role="site", now=now, not_after=now + timedelta(days=1))
    assert "our certificate is of another authority than the fleet's" in refusal_of(plant.presented(stranger))
    # The other way round: somebody poses as the broker.
    text = refusal_of(plant.presented(stranger, other))
    assert "we do not trust the broker's certificate: " in text
    assert "is the kit, or --ca, that of this fleet?" in text


def test_a_broker_under_a_name_it_has_no_certificate_for_is_not_trusted(plant: Plant, tmp_path: Path) -> None:
    kit = read_kit(plant.kits / "a.kit")
    text = refusal_of(kit.broker_url(f"mqtts://127.1:{plant.broker.port}"))
    assert "is not valid for '127.1'" in text
    assert "use a name it is made for" in text


def test_an_expired_certificate_is_refused(plant: Plant) -> None:
    now = datetime.now(timezone.utc)
    past = now - timedelta(days=2)
    expired = issue_certificate(
        plant.authority(), name="a", fleet="test", role="site", now=past, not_after=now - timedelta(days=1)
    )
    assert "our certificate has expired; ask whoever runs the fleet for a new kit" in refusal_of(
        plant.presented(expired)
    )


def test_without_a_certificate_nobody_comes_in(plant: Plant, tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_bytes(plant.authority().cert)
    text = refusal_of(parse_broker_url(f"mqtts://localhost:{plant.broker.port}", tls=TlsFiles(ca=ca)))
    assert "it asks for a certificate of ours; name one with --kit, or --cert and --key" in text


def test_plain_tcp_is_refused(plant: Plant) -> None:
    text = refusal_of(parse_broker_url(f"mqtt://localhost:{plant.broker.port}"), connect_timeout_s=0.8)
    assert "closed the connection without an answer; does its port want mqtts://, or --kit?" in text


def test_tls_to_a_plain_port_says_so(plant: Plant, tmp_path: Path) -> None:
    with BrokerProcess("mosquitto", tmp_path) as plain:
        url = read_kit(plant.kits / "a.kit").broker_url(f"mqtts://localhost:{plain.port}")
        text = refusal_of(url, connect_timeout_s=0.8)
        assert "the TLS handshake broke off (" in text
        assert "does this port speak TLS" in text


def test_a_certificate_nobody_enrolled_has_no_rights(plant: Plant) -> None:
    now = datetime.now(timezone.utc)
    unknown = issue_certificate(
        plant.authority(), name="nobody", fleet="test", role="site", now=now, not_after=now + timedelta(days=1)
    )
    assert "we may not read what we have to (Not authorized)" in refusal_of(plant.presented(unknown))


@pytest.mark.parametrize(
    ("name", "topic_filter"),
    [
        ("a", f"{BASE}/site/b/down/message"),
        ("a", f"{BASE}/site/b/presence"),
        ("a", f"{BASE}/site/+/down/message"),
        ("a", f"{BASE}/#"),
        ("a", "#"),
        ("a", f"{BASE}/site/a/up/message"),
        ("a", "edgeflame/v1/other/round"),
        ("a", "$CONTROL/dynamic-security/v1/response"),
        ("line-1", f"{BASE}/site/a/down/message"),
        ("line-1", f"{BASE}/blob/+/+"),
        ("line-1", f"{BASE}/line/line-2/models"),
        ("engineer", f"{BASE}/blob/+/+"),
        ("engineer", f"{BASE}/site/+/up/message"),
        ("foreman", f"{BASE}/release/+/+"),
        ("watcher", f"{BASE}/release/+/+"),
        ("watcher", f"{BASE}/blob/+/+"),
        ("watcher", f"{BASE}/site/+/up/#"),
        ("aggregator", "$CONTROL/dynamic-security/v1/response"),
        ("admin", f"{BASE}/site/+/up/#"),
    ],
)
def test_nobody_reads_what_is_not_theirs(plant: Plant, name: str, topic_filter: str) -> None:
    assert "we may not read what we have to (Not authorized)" in refusal_of(plant.url(name), topic_filter)


@pytest.mark.parametrize(
    ("name", "topic_filter"),
    [
        ("a", f"{BASE}/site/a/down/message"),
        ("a", f"{BASE}/blob/{'0' * 64}/+"),
        ("a", f"{BASE}/aggregator/presence"),
        ("line-1", f"{BASE}/model/+"),
        ("line-1", f"{BASE}/release/{'0' * 64}/+"),
        ("engineer", f"{BASE}/model/+"),
        ("engineer", f"{BASE}/line/+/models"),
        ("engineer", f"{BASE}/line/+/up/message"),
        ("foreman", f"{BASE}/line/+/reply"),
        ("watcher", f"{BASE}/line/+/models"),
        ("line-1", f"{BASE}/line/line-1/command"),
        ("watcher", f"{BASE}/site/+/up/message"),
        ("watcher", f"{BASE}/status/+"),
        ("aggregator", f"{BASE}/site/+/up/#"),
    ],
)
def test_everybody_reads_what_is_theirs(plant: Plant, name: str, topic_filter: str) -> None:
    with Client(plant.url(name), topic_filter) as client:
        client.up()


@pytest.mark.parametrize(
    ("name", "forbidden", "allowed"),
    [
        ("a", f"{BASE}/site/b/up/message", f"{BASE}/site/a/up/message"),
        ("a", f"{BASE}/site/b/presence", f"{BASE}/site/a/presence"),
        ("a", f"{BASE}/site/a/down/message", f"{BASE}/site/a/up/blob/x/0"),
        ("a", f"{BASE}/round", f"{BASE}/site/a/up/message"),
        ("a", f"{BASE}/blob/{'0' * 64}/0", f"{BASE}/site/a/up/message"),
        ("line-1", f"{BASE}/site/line-1/up/message", f"{BASE}/line/line-1/verdict"),
        ("line-1", f"{BASE}/model/tile", f"{BASE}/line/line-1/models"),
        ("line-1", f"{BASE}/release/{'0' * 64}/0", f"{BASE}/line/line-1/up/message"),
        ("line-1", f"{BASE}/line/line-2/models", f"{BASE}/line/line-1/models"),
        ("engineer", f"{BASE}/line/line-1/models", f"{BASE}/model/tile"),
        ("engineer", f"{BASE}/blob/{'0' * 64}/0", f"{BASE}/release/{'0' * 64}/0"),
        ("engineer", f"{BASE}/round", f"{BASE}/line/line-1/command"),
        ("foreman", f"{BASE}/line/line-1/reply", f"{BASE}/line/line-1/command"),
        ("foreman", f"{BASE}/model/tile", f"{BASE}/line/line-1/command"),
        ("line-1", f"{BASE}/line/line-2/command", f"{BASE}/line/line-1/reply"),
        ("aggregator", f"{BASE}/line/line-1/command", f"{BASE}/round"),
        ("aggregator", f"{BASE}/model/tile", f"{BASE}/round"),
        ("aggregator", f"{BASE}/site/a/up/message", f"{BASE}/site/a/down/message"),
        ("admin", f"{BASE}/round", f"{BASE}/site/a/down/message"),
    ],
)
def test_nobody_speaks_in_anothers_name(plant: Plant, name: str, forbidden: str, allowed: str) -> None:
    with Client(plant.url("aggregator"), f"{BASE}/#") as reader, Client(plant.url(name), *_any_filter(name)) as writer:
        reader.up()
        writer.up()
        writer.link.publish(forbidden, b"forged")
        writer.link.publish(allowed, b"rightly")
        assert reader.message() == (allowed, b"rightly"), "in order: the forged one would have come first"


def test_a_watcher_only_watches(plant: Plant) -> None:
    with Client(plant.url("aggregator"), f"{BASE}/#") as reader:
        reader.up()
        with Client(plant.url("watcher")) as watcher:
            watcher.up()
            for topic in ("status/phase", "round", "site/watcher/up/message", "watcher", "line/line-1/command"):
                watcher.link.publish(f"{BASE}/{topic}", b"forged")
        # Its end has sent them all.
        reader.link.publish(f"{BASE}/end", b"rightly")
        assert reader.message() == (f"{BASE}/end", b"rightly")


def _any_filter(name: str) -> tuple[str, ...]:
    own = {
        "admin": "$CONTROL/dynamic-security/v1/response",
        **dict.fromkeys(("engineer", "foreman"), f"{BASE}/model/+"),
    }
    return (own[name],) if name in own else ()


def edgeflame(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeflame", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)


def test_a_revoked_site_is_thrown_out_and_told_why_and_the_others_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    made = make_plant(folder, "a", "b", "c")
    gate = tmp_path / "gate"
    gate.mkdir()
    with start(folder, made.registry.port) as broker:
        with Fleet(broker, tmp_path, kits=folder / "kits", config="deadline_s = 6.0\nquorum = 0.5") as fleet:
            aggregator = fleet.aggregator("--sites", "3", "--rounds", "1")
            # The others have sent their updates, and wait for it.
            sites = {name: fleet.site(name, TINY_GATE=str(gate) if name == "b" else "") for name in "abc"}
            wait_for((gate / "waiting-b-1").exists, "b trains")
            # In this process: starting another takes longer than the deadline where the machine is busy.
            done = CliRunner().invoke(cli, ["fleet", "revoke", str(folder), "b", "--reason", "the laptop was stolen"])
            assert done.exception is None
            assert "b: revoked, told and thrown out" in done.output
            assert sites["b"].wait() == 8
            assert (
                sites["b"]
                .log.rstrip()
                .splitlines()[-1]
                .endswith("this site was revoked by the fleet's administrator: the laptop was stolen")
            )
            assert [aggregator.wait(), sites["a"].wait(), sites["c"].wait()] == [0, 0, 0]
            assert all(process.log.count("broker_lost") == 0 for process in (aggregator, sites["a"], sites["c"]))
            (entry,) = fleet.ledger()["rounds"]
            assert [c["site"] for c in entry["contributed"]] == ["a", "c"]

            # It comes back with the same kit: the certificate is good, but the name has no rights.
            again = fleet.site("b", process="again")
            assert again.wait() == 7
            assert "we may not read what we have to (Not authorized)" in again.log.rstrip().splitlines()[-1]
            # With the new revocation list TLS itself refuses it.
            broker.reload()
            wait_for(lambda: "Reloading config" in broker.log, "the broker reloads")
            url = read_kit(folder / "kits" / "b.kit").broker_url()
            wait_for(lambda: "our certificate was revoked" in refusal_of(url), "TLS refuses it")
        # The broker forgets nothing over a restart.
        broker.kill()
        broker.start()
        with Client(read_kit(folder / "kits" / "c.kit").broker_url()) as other:
            other.up()


def test_a_connected_site_that_does_not_listen_is_thrown_out_for_good(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    made = make_plant(folder, "a")
    with start(folder, made.registry.port), Client(read_kit(folder / "kits" / "a.kit").broker_url()) as client:
        client.up()
        with open_fleet(folder) as fleet:
            fleet.revoke("a", reason="")
            with BrokerControl(fleet.admin_kit().broker_url(), fleet="test", connect_timeout_s=5) as control:
                assert not control.notify_revoked("a", "")
                assert control.sync(fleet.registry.clients()) == 2
                assert control.sync(fleet.registry.clients()) == 0, "nobody is disturbed twice"
        assert type(client.events.get(timeout=30)).__name__ == "Disconnected"
        assert "have no rights there any more (Not authorized): we were revoked" in client.refusal


def test_who_is_enrolled_while_the_broker_runs_comes_in_at_once(plant: Plant) -> None:
    done = edgeflame("fleet", "enrol", plant.folder, "new")
    assert done.returncode == 0, done.stderr
    assert "the broker was told" in done.stdout
    with Client(plant.url("new"), f"{BASE}/site/new/down/message") as client:
        client.up()
    done = edgeflame("fleet", "sync", plant.folder)
    assert re.search(r"the broker knows the \d+ members of test", done.stdout)


def test_a_revocation_the_broker_does_not_hear_of_is_not_taken_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    make_plant(folder, "a")
    done = edgeflame("fleet", "revoke", folder, "a", "--connect-timeout", "0.3")
    assert done.returncode == 7
    assert "a is revoked in" in done.stderr.splitlines()[-1]
    assert "NOT YET on the broker" in done.stderr.splitlines()[-1]


def test_a_line_speaks_with_its_kit(plant: Plant) -> None:
    from edge.config.outputs import MqttConfig
    from edge.delivery.mqtt import MqttDestination
    from edge.status import LineState
    from edgeflame.errors import ConfigError

    kit = str(plant.kits / "line-1.kit")
    state = LineState(online=True, boot="b", product="p", model="m", threshold=1.0, source="s")
    with Client(plant.url("watcher"), f"{BASE}/line/line-1/state") as reader:
        reader.up()
        line = MqttDestination(MqttConfig(fleet="test", line="line-1", kit=kit), state)
        line.idle()
        event = reader.events.get(timeout=30)
        assert isinstance(event, ReceivedMessage)
        assert b'"online":true' in event.payload
        line.close()
    for fleet, name in (("test", "line-2"), ("other", "line-1")):
        with pytest.raises(ConfigError, match="the kit of the line 'line-1' of the fleet 'test'; expected"):
            MqttDestination(MqttConfig(fleet=fleet, line=name, kit=kit), state)
    with pytest.raises(ConfigError, match="the kit of the site 'a'"):
        MqttDestination(MqttConfig(fleet="test", line="a", kit=str(plant.kits / "a.kit")), state)
    with pytest.raises(ConfigError, match="broker or kit"):
        MqttConfig(fleet="test", line="line-1")
    with pytest.raises(ConfigError, match=r"mqtt\.kit holds the certificates"):
        MqttConfig(fleet="test", line="line-1", kit=kit, ca="x")


@pytest.mark.parametrize("name", ["a", "line-1", "watcher", "foreman", "engineer", "aggregator", "admin"])
def test_the_doctor_is_let_in_with_the_kit_of_any_role(name: str, plant: Plant) -> None:
    kit = str(plant.kits / f"{name}.kit")
    told = CliRunner().invoke(cli, ["doctor", "--kit", kit, "--connect-timeout", "5", "--json"]).stdout
    findings = {finding["check"]: finding for finding in json.loads(told)}
    assert findings["broker"]["level"] == "ok", findings["broker"]
