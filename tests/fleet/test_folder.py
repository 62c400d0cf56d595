"""A fleet's folder, registry, kits and rights without a broker."""

from __future__ import annotations

import json
import ssl
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath

import msgspec
import pytest
from click.testing import CliRunner
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from cli import cli
from cli.options import BrokerOptions, option_or_kit
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, EdgeFlameError, LinkError, NegativeAnswerError, StorageError, UsageError
from edgeflame.mqtt.kit import Kit, encode_kit, read_kit
from fleet import broker_control
from fleet.folder import FleetFolder, make_fleet, open_fleet
from fleet.registry import BrokerClient
from tests.support.paths import REPOSITORY


def make(folder: Path, *, hosts: tuple[str, ...] = ("broker.plant", "10.0.0.5"), replace: bool = False) -> FleetFolder:
    return make_fleet(
        folder, fleet="boards", hosts=hosts, port=8883, bind=None, install_dir=None, plugin=None, broker_user=None,
        replace=replace,
    )  # fmt: skip


@pytest.fixture
def fleet(tmp_path: Path) -> FleetFolder:
    return make(tmp_path / "fleet")


def enrol(fleet: FleetFolder, name: str, **more: object) -> Path:
    options = {"role": "site", "days": 100, "out": None, "reinstate": False, **more}
    return fleet.enrol(name, **options)  # type: ignore[arg-type]


def run(*arguments: object) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(cli, ["fleet", *map(str, arguments)])
    return result.output, result.exception


def test_secrets_are_for_their_owner_alone(fleet: FleetFolder) -> None:
    enrol(fleet, "plant-a")
    public = {"ca.crt", "server.crt", "crl.pem", "mosquitto.conf", "edgeflame-key.pub", "lock"}
    for path in [fleet.path, *fleet.path.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = 0o700 if path.is_dir() else 0o644 if path.name in public else 0o600
        assert mode == expected, f"{path} {mode:o}"
        if path.is_file() and path.name in public:
            assert b"PRIVATE" not in path.read_bytes()


def test_certificates_say_what_they_are_for(fleet: FleetFolder) -> None:
    kit = read_kit(enrol(fleet, "plant-a"))
    ca = x509.load_pem_x509_certificate((fleet.path / "ca" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((fleet.broker_files / "server.crt").read_bytes())
    client = x509.load_pem_x509_certificate(kit.cert.encode())
    for cert in (server, client):
        cert.verify_directly_issued_by(ca)
        assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["broker.plant", "10.0.0.5"]
    assert client.subject.rfc4514_string() == "CN=plant-a,OU=site,O=boards"
    usage = client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert timedelta(days=99) < client.not_valid_after_utc - datetime.now(timezone.utc) < timedelta(days=101)


def test_a_kit_is_read_as_it_was_written_and_gives_tls(fleet: FleetFolder, caplog: pytest.LogCaptureFixture) -> None:
    path = enrol(fleet, "plant-a")
    kit = read_kit(path)
    assert (kit.fleet, kit.name, kit.role, kit.broker) == ("boards", "plant-a", "site", "mqtts://broker.plant:8883")
    url = kit.broker_url()
    context = url.ssl_context()
    assert isinstance(context, ssl.SSLContext)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert "PRIVATE" not in repr(kit) + repr(url)
    assert parse_config(encode_kit(kit), Kit, "again") == kit


@given(text=st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=("Cs",)), max_size=60))
def test_any_text_survives_a_kit(text: str) -> None:
    kit = Kit(
        fleet="f", name="n", role="site", broker=text, ca="-\nx\n", cert="c\n", key="k\n",
        expires=datetime(2030, 1, 1, tzinfo=timezone.utc),
    )  # fmt: skip
    assert parse_config(encode_kit(kit), Kit, "kit").broker == text


@pytest.mark.parametrize("data", [b"", b"fleet = 'x'", b"\xff\xfe", b'format = 2\nfleet = "x"', b"[" * 1000])
def test_what_is_no_kit_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.kit").write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.kit: not a kit"):
        read_kit(tmp_path / "x.kit")
    with pytest.raises(ConfigError, match="the kit cannot be read"):
        read_kit(tmp_path / "none.kit")


def test_an_expired_kit_says_so_before_it_connects(fleet: FleetFolder) -> None:
    path = enrol(fleet, "plant-a")
    later = datetime.now(timezone.utc) + timedelta(days=101)
    with pytest.raises(LinkError, match=r"of site plant-a expired on .*edgeflame fleet renew FOLDER plant-a"):
        read_kit(path, now=later)


def test_a_kit_others_can_read_is_warned_of(fleet: FleetFolder, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logging.getLogger("edgeflame").propagate = True
    path = enrol(fleet, "plant-a", days=10)
    path.chmod(0o644)
    read_kit(path)
    # Each once or twice: it depends on who else listens.
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == [
        "kit_readable_by_others",
        "kit_expires_soon",
    ]


def test_a_fleet_is_never_overwritten(fleet: FleetFolder, tmp_path: Path) -> None:
    before = (fleet.path / "fleet.json").read_bytes()
    with pytest.raises(UsageError, match=r"there is a fleet already.*--replace"):
        make(fleet.path)
    assert (fleet.path / "fleet.json").read_bytes() == before
    make(fleet.path, replace=True)
    (aside,) = tmp_path.glob("fleet.replaced-*")
    assert (aside / "fleet.json").read_bytes() == before
    assert (aside / "ca" / "ca.key").read_bytes() != (fleet.path / "ca" / "ca.key").read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="not empty and holds no fleet"):
        make(tmp_path / "other", replace=True)


@pytest.mark.parametrize("host", ["", "a b", "x/y", "1.2.3.4.5", "-" * 64 + ".x", "ü.plant", "a\nb"])
def test_a_host_that_is_none_leaves_nothing_behind(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="expected a host name or an IP address"):
        make(tmp_path / "fleet", hosts=(host,))
    assert not (tmp_path / "fleet").exists()


def test_names_are_given_once(fleet: FleetFolder) -> None:
    enrol(fleet, "plant-a")
    for name, problem in (
        ("plant-a", "is enrolled already"), ("aggregator", "a name of the fleet itself"), ("a/b", "expected 1 to 64"),
        ("+", "expected 1 to 64"), ("#", "expected 1 to 64"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=problem):
            enrol(fleet, name)
    fleet.revoke("plant-a", reason="lost")
    with pytest.raises(UsageError, match=r"was revoked on .*--reinstate"):
        enrol(fleet, "plant-a")
    with pytest.raises(UsageError, match="was revoked"):
        fleet.renew("plant-a", days=1, out=None, revoke_old=False)
    enrol(fleet, "plant-a", reinstate=True)
    with pytest.raises(UsageError, match="is not enrolled in the fleet boards; these are: admin, aggregator, broker"):
        fleet.revoke("plant-x", reason="")
    with pytest.raises(UsageError, match="admin cannot be revoked"):
        fleet.revoke("admin", reason="")


def revoked_serials(fleet: FleetFolder) -> set[str]:
    listed = x509.load_pem_x509_crl((fleet.broker_files / "crl.pem").read_bytes())
    ca = x509.load_pem_x509_certificate((fleet.path / "ca" / "ca.crt").read_bytes())
    assert listed.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    assert listed.next_update_utc == ca.not_valid_after_utc, "a stale list would shut everybody out"
    return {f"{entry.serial_number:x}" for entry in listed}


def test_a_revocation_lists_every_certificate_of_the_name(fleet: FleetFolder) -> None:
    enrol(fleet, "plant-a")
    first = fleet.registry.require("plant-a").serial
    fleet.renew("plant-a", days=5, out=None, revoke_old=False)
    second = fleet.registry.require("plant-a").serial
    assert revoked_serials(fleet) == set()
    fleet.revoke("plant-a", reason="lost")
    assert revoked_serials(fleet) == {first, second}
    fleet.write_access()
    document = json.loads((fleet.broker_files / "dynamic-security.json").read_bytes())
    assert {entry["username"] for entry in document["clients"]} == {"admin", "aggregator"}


def test_renewing_may_take_the_old_certificate_back(fleet: FleetFolder) -> None:
    path = enrol(fleet, "plant-a")
    first = fleet.registry.require("plant-a").serial
    old_key = read_kit(path).key
    fleet.renew("plant-a", days=5, out=None, revoke_old=True)
    assert revoked_serials(fleet) == {first}
    assert read_kit(path).key != old_key
    before = (fleet.broker_files / "server.crt").read_bytes()
    fleet.renew("broker", days=5, out=None, revoke_old=False)
    assert (fleet.broker_files / "server.crt").read_bytes() != before


def test_a_damaged_fleet_is_one_line(fleet: FleetFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no fleet here"), open_fleet(tmp_path / "nothing"):
        pass
    assert not (tmp_path / "nothing").exists()
    (fleet.path / "ca" / "ca.crt").write_text("garbage")
    with pytest.raises(StorageError, match="authority's certificate or key cannot be read"):
        enrol(fleet, "plant-a")
    (fleet.path / "fleet.json").write_text("{")
    with pytest.raises(StorageError, match=r"fleet\.json: damaged"), open_fleet(fleet.path):
        pass


def test_members_are_listed_with_their_expiry(fleet: FleetFolder) -> None:
    enrol(fleet, "plant-a", days=3)
    fleet.revoke("plant-a", reason="lost")
    output, error = run("members", fleet.path, "--json")
    assert error is None
    rows = {row["name"]: row for row in json.loads(output)["members"]}
    assert rows["plant-a"]["days_left"] == 2
    assert rows["plant-a"]["reason"] == "lost"
    assert rows["broker"]["revoked"] is None
    entry = msgspec.structs.replace(
        fleet.registry.require("aggregator"), not_after=datetime(2020, 1, 1, tzinfo=timezone.utc)
    )
    others = tuple(other for other in fleet.registry.identities if other.name != "aggregator")
    fleet._save_registry(msgspec.structs.replace(fleet.registry, identities=(*others, entry)))
    output, error = run("members", fleet.path)
    assert isinstance(error, NegativeAnswerError)
    assert "expired: aggregator" in str(error)
    assert "2020-01-01" in output


def test_options_and_kit_must_agree(fleet: FleetFolder) -> None:
    path = enrol(fleet, "plant-a")
    found = BrokerOptions(kit=path).resolve("site")
    assert (found.fleet, found.name, found.url.address) == ("boards", "plant-a", "mqtts://broker.plant:8883")
    other = BrokerOptions(broker="mqtts://10.0.0.5:1", kit=path).resolve("site")
    assert other.url.address == "mqtts://10.0.0.5:1"

    def refused(match: str, options: BrokerOptions, role: str = "site") -> None:
        with pytest.raises(EdgeFlameError, match=match):
            options.resolve(role)

    refused("--broker or --kit", BrokerOptions())
    refused("--fleet: missing", BrokerOptions(broker="mqtt://10.0.0.5"))
    refused("--fleet 'c': the kit is made for 'boards'", BrokerOptions(kit=path, fleet="c"))
    refused("the kit of the site 'plant-a'; this command takes", BrokerOptions(kit=path), "aggregator")
    refused("--kit holds the certificates", BrokerOptions(kit=path, cert=Path("x")))
    refused("starts with mqtts://", BrokerOptions(kit=path, broker="mqtt://10.0.0.5"))
    assert option_or_kit("--site", None, "plant-a") == "plant-a"
    with pytest.raises(UsageError, match="--site 'b': the kit is made for 'plant-a'"):
        option_or_kit("--site", "b", "plant-a")
    with pytest.raises(UsageError, match="--site: missing"):
        option_or_kit("--site", None, None)


def test_a_broker_is_told_only_what_it_does_not_know() -> None:
    both = [BrokerClient(name="a", role="site"), BrokerClient(name="gone", role="site")]
    clients = [both[0], msgspec.structs.replace(both[1], is_active=False)]
    document = json.loads(broker_control.dynamic_security(both, "f"))
    extra = {"username": "somebody-else", "roles": []}
    known, roles = [*document["clients"], extra], document["roles"]
    told = broker_control.sync_commands(clients, "f", clients=known, roles=roles)
    assert told == [
        {"command": "modifyClient", "username": "gone", "roles": []},
        {"command": "disableClient", "username": "gone"},
    ]
    known[1] = {"username": "gone", "roles": [], "disabled": True}
    assert broker_control.sync_commands(clients, "f", clients=known, roles=roles) == []
    fresh = broker_control.sync_commands(clients, "f", clients=[], roles=[])
    assert [command["command"] for command in fresh] == ["createRole", "createClient"]
    roles[0]["acls"] = roles[0]["acls"][1:]
    known[0] = {"username": "a", "roles": [], "disabled": True}
    commands = broker_control.sync_commands(clients, "f", clients=known, roles=roles)
    assert [command["command"] for command in commands] == ["modifyRole", "modifyClient", "enableClient"]


REFERENCE = (
    BrokerClient(name="admin", role="admin"),
    BrokerClient(name="aggregator", role="aggregator"),
    BrokerClient(name="engineer", role="publisher"),
    BrokerClient(name="foreman", role="operator"),
    BrokerClient(name="line-1", role="line"),
    BrokerClient(name="office", role="observer"),
    BrokerClient(name="plant-a", role="site"),
    BrokerClient(name="plant-b", role="site"),
)


def test_the_reference_configuration_is_what_the_generator_writes() -> None:
    """To renew it: ``python -m tests.fleet.test_folder``."""
    for name, text in reference_files().items():
        assert (REPOSITORY / "deploy" / "mosquitto" / name).read_text() == text, name


def reference_files() -> dict[str, str]:
    settings = broker_control.BrokerSettings(
        fleet="boards",
        port=8883,
        bind=None,
        folder=PurePosixPath("/etc/mosquitto/edgeflame"),
        plugin=PurePosixPath("/usr/lib/x86_64-linux-gnu") / broker_control.PLUGIN_FILE,
    )
    return {
        broker_control.CONFIG_FILE: broker_control.mosquitto_conf(settings),
        broker_control.DYNAMIC_SECURITY: broker_control.dynamic_security(REFERENCE, "boards").decode(),
    }


if __name__ == "__main__":
    for file_name, contents in reference_files().items():
        (REPOSITORY / "deploy" / "mosquitto" / file_name).write_text(contents)
