"""Mosquitto's configuration for a fleet: mutual TLS on one port, rights by certificate name, room for our messages."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeflame.connection import MAX_PACKET_BYTES

PLUGIN_FILE = "mosquitto_dynamic_security.so"

CA_CERT, SERVER_CERT, SERVER_KEY = "ca.crt", "server.crt", "server.key"
REVOCATION_LIST, DYNAMIC_SECURITY = "crl.pem", "dynamic-security.json"
CONFIG, DATA = "mosquitto.conf", "data"

_TEMPLATE = """\
# Mosquitto for the EdgeFlame fleet {fleet}; written by `edgeflame fleet init`. Tested with 2.0.11, good for 2.1.
# One port, TLS 1.2 or newer, and nobody without a certificate of the fleet's own authority.
{user}
listener {port}{bind}
cafile {folder}/{ca}
certfile {folder}/{cert}
keyfile {folder}/{key}
crlfile {folder}/{crl}
tls_version tlsv1.2
require_certificate true
# The certificate's common name is the client's name; its rights hang on that (and the password is never asked for).
use_identity_as_username true
allow_anonymous false

# Rights. The broker writes this file itself when `edgeflame fleet enrol` and `revoke` change them.
plugin {plugin}
plugin_opt_config_file {folder}/{dynsec}

# The largest packet is a chunk or a message of 1 MiB. Mosquitto 2.1 would allow 2,000,000 bytes by default.
max_packet_size {max_packet_bytes}
# What one client may be behind before messages are dropped (the transfer repairs that, slowly). By default 1000
# messages; an aggregator with 100 sites has 16 chunks of each on their way, besides heartbeats.
max_inflight_messages 100
max_queued_messages 20000
max_queued_bytes 536870912
# The round state and who is there are retained; they outlive a restart of the broker.
persistence true
persistence_location {folder}/{data}
autosave_interval 60
set_tcp_nodelay true

log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
connection_messages true
log_timestamp_format %Y-%m-%dT%H:%M:%S
"""


@dataclass(frozen=True, kw_only=True)
class BrokerSettings:
    """What differs from broker to broker.

    Attributes:
        fleet: for the reader.
        port: for TLS.
        bind: the address to listen on; None for all.
        folder: where this configuration lies on the broker's machine.
        plugin: the ``dynamic-security`` plugin's file there.
        user: whom a broker started by root becomes; None for its own default (``mosquitto``).
    """

    fleet: str
    port: int
    bind: str | None
    folder: PurePosixPath
    plugin: PurePosixPath
    user: str | None = None


def mosquitto_conf(settings: BrokerSettings) -> str:
    """The text of ``mosquitto.conf``."""
    return _TEMPLATE.format(
        fleet=settings.fleet,
        user="" if settings.user is None else f"\nuser {settings.user}",
        port=settings.port,
        bind="" if settings.bind is None else f" {settings.bind}",
        folder=settings.folder,
        ca=CA_CERT,
        cert=SERVER_CERT,
        key=SERVER_KEY,
        crl=REVOCATION_LIST,
        plugin=settings.plugin,
        dynsec=DYNAMIC_SECURITY,
        max_packet_bytes=MAX_PACKET_BYTES,
        data=DATA,
    )


def find_plugin() -> PurePosixPath:
    """The plugin on this machine, or where Debian puts it."""
    debian = Path("/usr/lib") / str(sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu") / PLUGIN_FILE
    others = (Path("/usr/lib") / PLUGIN_FILE, Path("/usr/lib64") / PLUGIN_FILE, Path("/usr/local/lib") / PLUGIN_FILE)
    found = next((path for path in (debian, *others) if path.exists()), debian)
    return PurePosixPath(found)
