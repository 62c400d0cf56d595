"""``edgeflame broker``: the embedded broker alone."""

from __future__ import annotations

import click

from cli.output import echo

_PORT = click.IntRange(0, 65535)


@click.command(short_help="Run the embedded MQTT 5 broker.")
@click.option(
    "--port",
    type=_PORT,
    default=1883,
    show_default=True,
    help="Port for MQTT 5; 0 takes a free one.",
)
@click.option("--bind", default="127.0.0.1", show_default=True, help="IPv4 address to listen on.")
@click.option("--port-mqtt3", type=_PORT, default=None, help="A second port, for MQTT 3.1.1 clients.")
def command(port: int, bind: str, port_mqtt3: int | None) -> None:
    """Run the embedded MQTT 5 broker until Ctrl-C.

    It has no access control: whoever reaches the port may read and write everything. Leave it on the loopback
    interface, or on a network of its own; a fleet runs on Mosquitto.
    """
    from edgeflame.log import EventLog
    from edgeflame.mqtt.embedded_broker import EmbeddedBroker

    log = EventLog("broker")
    with EmbeddedBroker(port=port, bind=bind, port_mqtt3=port_mqtt3) as broker:
        if bind not in ("127.0.0.1", "localhost"):
            log.warning("broker_open_to_network", bind=bind, access_control="none")
        echo(f"listening on {broker.url}")
        broker.wait()
