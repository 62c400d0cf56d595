"""What the protocol side and its worker process say to each other: JSON, one message a line.

The worker reads :class:`Setup` first, then one order at a time; it answers with any number of :class:`Step` and
one :class:`Done` or :class:`Problem`. The end of its standard input is the end of the worker.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edgeflame.learning import Learning
from edgeflame.messages import StatisticsWanted


class _Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class Setup(_Line, frozen=True, kw_only=True, tag="setup"):
    """What the work is built from; paths are absolute."""

    learning: Learning
    site: str
    data: str
    state: str
    """A folder the work may keep things in."""
    groups_file: str | None = None


class InitialOrder(_Line, frozen=True, kw_only=True, tag="initial"):
    out: str


class TrainOrder(_Line, frozen=True, kw_only=True, tag="train"):
    round: int
    base: str
    history: str | None
    out: str
    seed: int
    private: str | None = None
    private_out: str | None = None


class StatisticsOrder(_Line, frozen=True, kw_only=True, tag="statistics"):
    model: str
    model_sha256: str
    wanted: StatisticsWanted
    out: str


class FinishOrder(_Line, frozen=True, kw_only=True, tag="finish"):
    model: str
    out_dir: str
    ledger: dict[str, Any]
    private: str | None = None
    statistics: str | None = None


Order = InitialOrder | TrainOrder | StatisticsOrder | FinishOrder
ToWorker = Setup | Order


class Ready(_Line, frozen=True, kw_only=True, tag="ready"):
    """The work is built."""


class Step(_Line, frozen=True, kw_only=True, tag="step"):
    """Progress of the order at hand."""

    done: int
    total: int
    note: str = ""


class Done(_Line, frozen=True, kw_only=True, tag="done"):
    """The order is carried out; which fields are set depends on it."""

    num_samples: int = 0
    num_steps: int = 0
    metrics: dict[str, float] = {}
    package: str | None = None
    statistics: str | None = None
    summary: dict[str, float | str] = {}


class Problem(_Line, frozen=True, kw_only=True, tag="problem"):
    """An expected error: the class of ``edgeflame.errors`` and its message."""

    error: str
    message: str


FromWorker = Ready | Step | Done | Problem

TO_WORKER: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
FROM_WORKER: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker)


def encode_line(message: ToWorker | FromWorker) -> bytes:
    """The message as a line."""
    return msgspec.json.encode(message) + b"\n"
