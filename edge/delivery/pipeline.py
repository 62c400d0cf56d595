"""The parts of guaranteed delivery put together for one run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.config import InspectConfig
from edge.delivery.deliverer import Deliverer, Destination
from edge.delivery.mqtt import LineState, MqttDestination, TakeCommand
from edge.delivery.outbox import Outbox
from edge.delivery.webhook import WebhookDestination
from edgeflame.console import EventLog
from edgeflame.statedir import locked_state_dir

log = EventLog("delivery")

OUTBOX_FILE = "outbox.sqlite"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A running delivery: each destination has its deliverer."""

    outbox: Outbox
    deliverers: Sequence[Deliverer]
    mqtt: MqttDestination | None
    """The broker among the destinations."""
    undelivered: dict[str, int]
    """After the end: results kept for the next start, by destination; none for one that has all."""

    def begin_flush(self) -> None:
        """All destinations get their last results at the same time, and not one after another."""
        for deliverer in self.deliverers:
            deliverer.begin_flush()

    def answer(self, reply: bytes) -> None:
        """Publish the reply to a command."""
        if self.mqtt is not None:
            self.mqtt.answer(reply)


@contextlib.contextmanager
def open_pipeline(
    state: Path,
    config: InspectConfig,
    line: LineState,
    *,
    make_room: Callable[[], bool],
    take: TakeCommand,
) -> Iterator[Pipeline]:
    """Open the outbox in a state folder and start delivering what it holds.

    Leaving it tries for ``delivery.flush_s`` to deliver what waits, and keeps the rest.

    Args:
        state: the daemon's folder; one daemon at a time.
        config: outbox, delivery and destinations.
        line: what is announced of it at first.
        take: gets what comes on the line's command topic.
        make_room: frees something of less worth than results when the disk is full.

    Raises:
        ConfigError: a destination's settings make no sense.
        StorageError: the folder cannot be used, or another process uses it.
    """
    deliverers: list[Deliverer] = []
    undelivered: dict[str, int] = {}

    def count_undelivered() -> None:
        waiting = {deliverer.name: deliverer.standing().waiting for deliverer in deliverers}
        undelivered.update({name: count for name, count in waiting.items() if count})

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(locked_state_dir(state, holds="line"))
        outbox = stack.enter_context(Outbox(folder / OUTBOX_FILE, config.outbox, make_room=make_room))
        destinations: list[Destination] = []
        mqtt = MqttDestination(config.mqtt, line, take=take) if config.mqtt is not None else None
        if mqtt is not None:
            destinations.append(mqtt)
        if config.webhook is not None:
            destinations.append(WebhookDestination(config.webhook))
        for name in outbox.forget([destination.name for destination in destinations]):
            log.warning("destination_forgotten", destination=name, reason="it is no longer configured")
        # Last in, first out: the deliverers finish before the count.
        stack.callback(count_undelivered)
        deliverers += [
            stack.enter_context(Deliverer(outbox, destination, config.delivery)) for destination in destinations
        ]
        yield Pipeline(outbox=outbox, deliverers=deliverers, mqtt=mqtt, undelivered=undelivered)
