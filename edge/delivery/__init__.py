"""Guaranteed delivery: each result is written to the disk first, and sent until each destination has acknowledged it.

    camera ──> OutboxWriter ──> Outbox (SQLite) ──> live sinks (terminal, files, pictures)
                                  │
                                  ├──> Deliverer ──> MQTT broker
                                  └──> Deliverer ──> webhook

The PLC that ejects the part gets the verdict before all of them (:mod:`edge.delivery.plc`).

A result's ``number`` is its place in the outbox and never used twice; together with the outbox's ``id`` it identifies
the result permanently. Delivery is at least once and in order; what may have been sent before is marked
``redelivered``.
"""
