"""``edgeflame fleet init``: a fleet's authority, its broker's configuration, its first kits."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import click


@click.command("init")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--fleet", required=True, metavar="NAME", help="The fleet's name.")
@click.option(
    "--host",
    "hosts",
    required=True,
    multiple=True,
    metavar="HOST",
    help="Name or address by which sites reach the broker; repeat it for more. Kits get the first.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8883, show_default=True, help="The broker's port.")
@click.option("--bind", metavar="ADDRESS", help="Where the broker listens.  [default: everywhere]")
@click.option(
    "--install-dir",
    metavar="PATH",
    help="Where DIR/broker will lie on the broker's machine.  [default: where it is made]",
)
@click.option("--plugin", metavar="PATH", help="mosquitto_dynamic_security.so there.  [default: looked for here]")
@click.option("--broker-user", metavar="USER", help="Whom Mosquitto becomes when root starts it.  [default: mosquitto]")
@click.option("--replace", is_flag=True, help="Put a fleet that is in DIR aside (renamed, not deleted).")
def init(
    folder: Path,
    fleet: str,
    hosts: tuple[str, ...],
    port: int,
    bind: str | None,
    install_dir: str | None,
    plugin: str | None,
    broker_user: str | None,
    replace: bool,
) -> None:
    """Make a fleet in DIR: certificate authority, signing key, and everything its Mosquitto needs.

    DIR holds the fleet's secrets and belongs on the administrator's machine. Copy DIR/broker to the broker's machine
    and start Mosquitto with it; give DIR/kits/aggregator.kit to the aggregator; then enrol the sites.
    """
    from edgeflame.fleet.folder import make_fleet

    made = make_fleet(
        folder,
        fleet=fleet,
        hosts=hosts,
        port=port,
        bind=bind,
        install_dir=None if install_dir is None else PurePosixPath(install_dir),
        plugin=None if plugin is None else PurePosixPath(plugin),
        broker_user=broker_user,
        replace=replace,
    )
    where = install_dir or made.broker_files
    click.echo(f"fleet {fleet} in {folder}, broker {made.registry.url}")
    click.echo(f"  broker:      mosquitto -c {where}/mosquitto.conf")
    click.echo(f"  aggregator:  edgeflame aggregate --kit {made.kit_path('aggregator')} --state DIR")
    click.echo(
        f"  a site:      edgeflame fleet enrol {folder} NAME --offline   (without --offline once the broker runs)"
    )
    click.echo(f"  packages:    edgeflame model sign F.edgeflame --key {folder}/signing/edgeflame-key.pem")
