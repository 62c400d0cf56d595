"""A site leaving its run for good: said until it is confirmed."""

from __future__ import annotations

from edgeflame.errors import FederationError
from edgeflame.messages import Leaving
from trainer.agent.exchange import REPEAT_S
from trainer.agent.voice import Voice

PATIENCE_S = 30.0
"""An aggregator that understands answers at once, or after its restart; seconds in which we are welcome there."""


class Farewell:
    """One departure.

    Args:
        reason: for the aggregator's ledger.
    """

    def __init__(self, reason: str) -> None:
        self.is_confirmed = False
        self._reason = reason
        self._said_at: float | None = None
        self._began_at = 0.0

    def tick(self, voice: Voice, run: str, now: float) -> None:
        """Say it, if it is time to.

        Raises:
            FederationError: nobody confirms.
        """
        if voice.welcomed_by is None:
            return
        if self._said_at is None:
            self._began_at = now
        elif now - self._began_at >= PATIENCE_S:
            msg = (
                f"the aggregator has not confirmed within {PATIENCE_S:g} s that this site leaves; one of protocol 1.0 "
                "does not know how to, and leaves the site out after its deadline"
            )
            raise FederationError(msg)
        if self._said_at is None or now - self._said_at >= REPEAT_S:
            self._said_at = now
            voice.send(Leaving(boot=voice.boot, run=run, detail=self._reason))
