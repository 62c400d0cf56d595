"""``edgeflame doctor``: what is wrong with this installation, and the one thing to do about each.

It checks the machine and its services, and whatever the user names: a package, a configuration, a broker. The
bundle is a zip for whoever helps: what the doctor found, what is installed, what the machine is. Nothing else goes
in.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from cli.options import BrokerOptions, broker_options
from cli.output import print_findings
from cli.paths import PATH
from edgeflame import __version__
from edgeflame.cpus import usable_cpus
from edgeflame.errors import EdgeFlameError, StorageError
from edgeflame.findings import Finding, ok, problem

if TYPE_CHECKING:
    from edge.config import InspectConfig


def write_bundle(path: Path, findings: Sequence[Finding]) -> None:
    """Write the zip: ``findings.json``, ``packages.txt``, ``machine.json``.

    No image, key, certificate, configuration, log or variable of the environment goes in; the user's home folder is
    written as ``~``.

    Raises:
        StorageError: it cannot be written.
    """
    packages = sorted(f"{item.metadata['Name']}=={item.version}" for item in importlib.metadata.distributions())
    machine = {
        "edgeflame": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cpus_to_use": usable_cpus(),
    }
    home = str(Path.home())
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in (
                ("findings.json", _pretty(findings)),
                ("machine.json", _pretty(machine)),
                ("packages.txt", "\n".join(packages) + "\n"),
            ):
                archive.writestr(name, data.replace(home, "~") if len(home) > 1 else data)
    except OSError as exc:
        raise StorageError(f"{path}: the bundle cannot be written ({exc.strerror})") from exc


def _pretty(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def check_config(path: Path, state: Path | None = None) -> Iterator[Finding]:
    """Check a configuration of any command; of an inspection with cameras also everything that it names.

    Args:
        path: the file.
        state: the state folder that the command is given.
    """
    from edge.config import InspectConfig
    from edgeflame.config import check_keys, load_config

    try:
        text = path.read_bytes()
    except OSError as exc:
        yield problem("configuration", f"{path}: cannot be read ({exc.strerror})", "correct its name, or its rights")
        return
    failures = []
    for command, kind in _config_kinds():
        try:
            settings: object = load_config(path, kind)
        except EdgeFlameError as exc:
            failures.append((_num_known(text, kind), f"{command}: {str(exc).removeprefix(f'{path}: ')}"))
        else:
            yield ok("configuration", f"{path} is one for edgeflame {command}")
            yield from check_keys(path, kind)
            if isinstance(settings, InspectConfig) and settings.cameras and settings.products:
                try:
                    yield from _check_line(settings, state)
                except EdgeFlameError as exc:
                    yield problem("line", str(exc), "correct what the message names")
            return
    # Where its keys show whose configuration it is, the errors of the other commands are left out.
    most = max(known for known, _ in failures)
    words = "; ".join(what for known, what in failures if known == most)
    yield problem("configuration", f"{path} fits no command: {words}", "correct the key that is named")


def _num_known(text: bytes, kind: type[msgspec.Struct]) -> int:
    """How many of a file's sections and keys a command has."""
    try:
        keys: set[str] = set(msgspec.toml.decode(text))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return 0
    return len(keys & {*kind.__struct_fields__, *getattr(kind, "OLD_KEYS", {})})


def _check_line(settings: InspectConfig, state: Path | None) -> Iterator[Finding]:
    from edge.cameras import Plan, plan_cameras
    from edge.check import check_daemon
    from edge.inspector import InspectorLoader

    loader = InspectorLoader()

    def read_plan() -> Plan:
        return plan_cameras(
            settings, model=None, source=None, product_of=lambda file: loader.package(file).manifest.product
        )

    for finding in check_daemon(read_plan, loader, state=state, images=None):
        # The file was found to be right already, and state folders are looked at by an option of their own.
        if finding.check != "state folder" and (finding.check, finding.level) != ("configuration", "ok"):
            yield finding


def _config_kinds() -> Iterator[tuple[str, type[msgspec.Struct]]]:
    from aggregator.config import AggregateConfig
    from aggregator.simulation.config import SimulationConfig
    from cli.train import SiteFile
    from edge.config import InspectConfig
    from edgeflame.methods import Learning

    yield "inspect", InspectConfig
    yield "aggregate", AggregateConfig
    yield "fit", Learning
    yield "train", SiteFile
    yield "simulate", SimulationConfig


CONNECT_TIMEOUT_S = 5.0


@click.command("doctor")
@click.option("--model", type=PATH, metavar="FILE", help="Check this model package, and run it.")
@click.option(
    "--config",
    type=PATH,
    metavar="FILE",
    help="Check this configuration, of whichever command; of a line also all it names.",
)
@click.option("--state", type=PATH, metavar="DIR", help="Check this state folder and its disk.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option(
    "--bundle", type=PATH, metavar="FILE", help="Also write a zip for whoever helps you: no secrets, no images."
)
@click.option(
    "--licences",
    "--licenses",
    is_flag=True,
    help="Only list everything that is installed with its licence, weights included; with --model those it is made of.",
)
@broker_options(fleet=False)
def command(
    model: Path | None,
    config: Path | None,
    state: Path | None,
    as_json: bool,
    bundle: Path | None,
    licences: bool,
    broker: BrokerOptions,
) -> None:
    """Check this machine and this installation, and whatever is named: a package, a configuration, a broker.

    Each line says what was found, and under it the one thing to do if something is wrong. The exit code is 0 when
    nothing is, and 1 otherwise.
    """
    if licences:
        from cli.doctor_licences import print_licences

        print_licences(model, as_json=as_json)
        return
    from cli.doctor_machine import check_machine, check_services

    findings = [*check_machine(state), *check_services()]
    if model is not None:
        from edge.check import check_package

        findings += check_package(model)
    if config is not None:
        findings += check_config(config, state)
    if broker.broker is not None or broker.kit is not None:
        findings += _check_member(broker)
    if bundle is not None:
        write_bundle(bundle, findings)
    print_findings(findings, as_json=as_json, footer=None if bundle is None else f"bundle: {bundle}")


def _check_member(broker: BrokerOptions) -> Iterator[Finding]:
    """Check the broker with the identity of the options or the kit; a kit of any role will do, since it only reads."""
    from edgeflame.mqtt.check import check_broker
    from fleet.broker_control import readable_topic
    from fleet.registry import BrokerClient

    try:
        url, kit = broker.open()
        readable = (
            "edgeflame/v1/doctor"
            if kit is None
            else readable_topic(BrokerClient(name=kit.name, role=kit.role), kit.fleet)
        )
    except EdgeFlameError as exc:
        yield problem("broker", str(exc), "correct what the message names")
        return
    yield from check_broker(
        url,
        filters=[readable],
        timeout_s=broker.connect_timeout or CONNECT_TIMEOUT_S,
        advice="check the address, the firewall and the credentials (--ca, --cert and --key, or the kit)",
    )
