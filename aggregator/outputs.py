"""What the round machine wants done: the values that :class:`~aggregator.rounds.RoundMachine` returns."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.events import Event, Round
from edgeflame.mqtt.messages import DownMessage, Offer


@dataclass(frozen=True, kw_only=True)
class RecordEvent:
    """Write an event to the journal, before anything after it."""

    event: Event


@dataclass(frozen=True, kw_only=True)
class PublishState:
    """Publish the run's state to all."""


@dataclass(frozen=True, kw_only=True)
class SendToSite:
    """Send a message to a site."""

    site: str
    message: DownMessage


@dataclass(frozen=True, kw_only=True)
class ReceiveUpload:
    """Receive the offered blob, check it, and call :meth:`~aggregator.rounds.RoundMachine.upload_validated`."""

    site: str
    offer: Offer


@dataclass(frozen=True, kw_only=True)
class AggregateRound:
    """Make the round's model from its accepted updates, and call
    :meth:`~aggregator.rounds.RoundMachine.model_aggregated`; or pool the accepted statistics, and call
    :meth:`~aggregator.rounds.RoundMachine.statistics_pooled`.
    """

    round: Round


@dataclass(frozen=True, kw_only=True)
class DismissSite:
    """A site is no longer part of the run: tell its process, drop its unfinished upload, and release its name."""

    site: str
    detail: str


RoundOutput = RecordEvent | PublishState | SendToSite | ReceiveUpload | AggregateRound | DismissSite
