"""``edgeflame doctor``: what is wrong with this installation, and the one thing to do about each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeflame.cli.findings_report import report
from edgeflame.cli.link_options import link_options

if TYPE_CHECKING:
    from edgeflame.findings import Finding

CONNECT_TIMEOUT_S = 5.0

_FILE = click.Path(path_type=Path)


@click.command("doctor")
@click.option("--model", type=_FILE, metavar="FILE", help="Check this model package, and run it.")
@click.option(
    "--config",
    type=_FILE,
    metavar="FILE",
    help="Check this configuration of inspect, aggregate or fit; of a line also all it names.",
)
@click.option("--state", type=_FILE, metavar="DIR", help="Check this state folder and its disk.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option(
    "--bundle", type=_FILE, metavar="FILE", help="Also write a zip for whoever helps you: no secrets, no images."
)
@link_options()
def command(
    model: Path | None,
    config: Path | None,
    state: Path | None,
    as_json: bool,
    bundle: Path | None,
    broker: str | None,
    kit: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    connect_timeout: float | None,
) -> None:
    """Check this machine and this installation, and whatever is named: a package, a configuration, a broker.

    Each line says what was found, and under it the one thing to do if something is wrong. The exit code is 0 when
    nothing is, and 1 otherwise.
    """
    from edgeflame.cli.doctor.bundle import write_bundle
    from edgeflame.cli.doctor.machine import check_machine
    from edgeflame.cli.doctor.services import check_services

    findings = [*check_machine(state), *check_services()]
    if model is not None or config is not None or broker is not None or kit is not None:
        findings += _given(model, config, broker, kit, ca, cert, key, connect_timeout or CONNECT_TIMEOUT_S)
    if bundle is not None:
        write_bundle(bundle, findings)
    report(findings, as_json=as_json, footer=None if bundle is None else f"bundle: {bundle}")


def _given(
    model: Path | None, config: Path | None, broker: str | None, kit: Path | None, ca: Path | None, cert: Path | None,
    key: Path | None, connect_timeout_s: float,
) -> list[Finding]:  # fmt: skip
    from edgeflame.cli.doctor.given import check_broker, check_config, check_package
    from edgeflame.cli.link_options import contact
    from edgeflame.errors import EdgeFlameError
    from edgeflame.findings import problem
    from edgeflame.fleet.access import Client, readable_topic
    from edgeflame.fleet.kit import read_kit

    findings: list[Finding] = []
    if model is not None:
        findings += check_package(model)
    if config is not None:
        findings += check_config(config)
    if broker is not None or kit is not None:
        readable = "edgeflame/v1/doctor"
        try:
            # A kit of any role: the doctor is not a member, it only looks.
            if kit is not None:
                opened = read_kit(kit)
                url = opened.broker_url(broker)
                readable = readable_topic(Client(name=opened.name, role=opened.role), opened.fleet)
            else:
                url = contact(broker, kit=None, ca=ca, cert=cert, key=key, role="site").url
        except EdgeFlameError as exc:
            findings.append(problem("broker", str(exc), "correct what the message names"))
        else:
            findings += check_broker(url, connect_timeout_s, readable=readable)
    return findings
