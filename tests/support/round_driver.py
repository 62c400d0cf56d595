"""The round machine with a test that plays every site."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from aggregator.config import AggregateConfig
from aggregator.events import Event, RunStarted, RunState, initial_state
from aggregator.exchanges import ValidationResult
from aggregator.outputs import AggregateRound, ReceiveUpload, RecordEvent, RoundOutput, SendToSite
from aggregator.rounds import RoundMachine
from edgeflame.mqtt.messages import BlobManifest, FinishReport, Offer, Receipt, Refusal

RUN = "0" * 32
DEADLINE_S = 100.0


def sha(number: int) -> str:
    return f"{number:064x}"


class Driver:
    """A round machine, the events it recorded (``facts``) and all its outputs (``said``); the test plays every site."""

    def __init__(self, *, sites: int = 3, rounds: int = 2, quorum: float = 0.6, **more: object) -> None:
        config = AggregateConfig(rounds=rounds, min_available_sites=sites, quorum=quorum, deadline_s=DEADLINE_S, **more)  # type: ignore[arg-type]
        self.facts: list[Event] = [RunStarted(run=RUN, config=config, time="2026-01-01T00:00:00Z")]
        assert isinstance(self.facts[0], RunStarted)
        self.machine = RoundMachine(initial_state(self.facts[0]), now=0.0)
        self.said: list[RoundOutput] = []
        self.counter = itertools.count(1)
        self.made = 0
        self.changes: Iterator[float] = iter(())

    @property
    def state(self) -> RunState:
        return self.machine.state

    def take(self, outputs: list[RoundOutput]) -> list[RoundOutput]:
        self.said += outputs
        self.facts += [output.event for output in outputs if isinstance(output, RecordEvent)]
        for output in outputs:
            if isinstance(output, AggregateRound):
                self.made += 1
                if output.round.purpose == "statistics":
                    truncation = {"measured_max": 0.25}
                    self.take(
                        self.machine.statistics_pooled(sha256=sha(2000), size_bytes=9, truncation=truncation, now=0.0)
                    )
                    continue
                self.take(
                    self.machine.model_aggregated(
                        output.round.number,
                        sha256=sha(1000 + self.made),
                        size_bytes=500,
                        relative_change=next(self.changes, None),
                        now=0.0,
                    )
                )
        return outputs

    def ready(self, *sites: str, now: float = 0.0) -> None:
        for site in sites:
            self.take(self.machine.site_ready(site, install="1" * 32, initial=sha(0), now=now))

    def offer(
        self, purpose: str, number: int, sha256: str, *, samples: int = 10, size: int = 500, steps: int = 0
    ) -> Offer:
        manifest = BlobManifest(sha256=sha256, size_bytes=size, chunk_bytes=size, crc32s=bytes(4))
        return Offer(
            run=RUN,
            purpose=purpose,  # type: ignore[arg-type]
            round=number,
            manifest=manifest,
            num_samples=samples,
            num_steps=steps,
        )

    def deliver(
        self, site: str, offer: Offer, verdict: ValidationResult | None = None, now: float = 0.0
    ) -> Receipt | Refusal:
        """Offer, and let the blob arrive if it is wanted; the answer."""
        outputs = self.take(self.machine.offer_received(site, offer, now))
        if any(isinstance(output, ReceiveUpload) for output in outputs):
            outputs = self.take(self.machine.upload_validated(site, offer, verdict or ValidationResult(), now))
        answers = [o.message for o in outputs if isinstance(o, SendToSite) and o.site == site]
        assert len(answers) == 1
        assert isinstance(answers[0], Receipt | Refusal)
        return answers[0]

    def start(self, *sites: str) -> None:
        self.ready(*sites)
        assert isinstance(self.deliver(sites[0], self.offer("initial", 0, sha(0))), Receipt)

    def update(self, site: str, number: int, *, now: float = 0.0) -> Receipt | Refusal:
        return self.deliver(site, self.offer("update", number, sha(next(self.counter))), now=now)

    def finish(self, *sites: str) -> None:
        assert self.state.model is not None
        for site in sites:
            self.take(self.machine.finish_report_received(site, FinishReport(run=RUN, model=self.state.model), 0.0))
