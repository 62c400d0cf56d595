"""Guaranteed delivery: every result is on the disk first, and goes to its destinations until each has said so.

    camera ──> OutboxWriter ──> Outbox (SQLite) ──> live sinks (terminal, files, pictures)
                                  │
                                  ├──> Deliverer ──> MQTT broker
                                  └──> Deliverer ──> webhook

The PLC that ejects the part is told before all of them (:mod:`edge.delivery.plc`).

A result's ``number`` is its place in the outbox and never used twice; with the outbox's ``id`` it names the result
for good. Delivery is at least once and in order; what may have been sent before is marked ``redelivered``.
"""
