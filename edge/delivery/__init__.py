"""Guaranteed delivery: every result is on the disk first, and goes to its destinations until each has said so.

    inspector ──> Writer ──> Outbox (SQLite) ──> live sinks (terminal, files, pictures)
                               │
                               ├──> Deliverer ──> MQTT broker
                               └──> Deliverer ──> webhook

A result's ``number`` is its place in the outbox and never used twice; with the outbox's ``id`` it names the result
for good. Delivery is at least once and in order; what may have been sent before is marked ``redelivered``.
"""

from edge.delivery.deliverer import Deliverer, DeliveryConfig, Destination
from edge.delivery.message import Delivery
from edge.delivery.outbox import Outbox, OutboxConfig, Standing
from edge.delivery.writer import Writer

__all__ = [
    "Deliverer",
    "Delivery",
    "DeliveryConfig",
    "Destination",
    "Outbox",
    "OutboxConfig",
    "Standing",
    "Writer",
]
