"""What can be asked of the teaching, and what it answers: the same over HTTP, MQTT and on the command line."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal

import msgspec

from edge.config.inspection import Rectangle
from edge.teaching.record import LiveModel, RefusedPicture, TakenPhotograph, TaughtModel
from edgeflame.mqtt.release_messages import Disagreement

TeachingAction = Literal[
    "new", "region", "collect", "stop", "take", "join", "part", "throw-out", "take-back",
    "learn", "cancel", "threshold", "try", "end-trial", "live", "back", "discard", "status",
]  # fmt: skip
ACTIONS: dict[TeachingAction, str] = {
    "new": "begin a product on a camera",
    "region": "set the region of interest, or none",
    "collect": "take each next part as a good one",
    "stop": "take no more",
    "take": "take the next picture, of another part or of the same one",
    "join": "the photographs show one part",
    "part": "each of the photographs shows a part of its own",
    "throw-out": "learn without these photographs",
    "take-back": "learn with them after all",
    "learn": "learn a model from what was collected",
    "cancel": "end learning",
    "threshold": "choose another threshold for the model learnt, or its own",
    "try": "try the model learnt: beside the present one, or alone",
    "end-trial": "end that",
    "live": "have the model learnt decide",
    "back": "go back to the model, or the product, before",
    "discard": "delete the product with all its photographs",
    "status": "say how it stands",
}
"""In words."""

_Word = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class TeachingOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One order about one product."""

    action: TeachingAction
    product: _Word
    camera: _Word | None = None
    """For ``new``; may be left out where there is only one."""
    region: Rectangle | None = None
    """For ``region``: x, y, width, height in pixels of the camera's picture; left out: the whole picture."""
    photographs: Annotated[tuple[_Word, ...], msgspec.Meta(max_length=100)] = ()
    """For ``join``, ``part``, ``throw-out``, ``take-back``: names of photographs."""
    same_part: bool = False
    """For ``take``: the picture shows the part of the photograph before."""
    threshold: float | None = None
    """For ``threshold``: one of those that the scores offer; left out: as it was learnt."""
    marks: bool = False
    """For ``learn``: also from what people marked, by a process that compares what it learns with the present model."""
    prior: _Word | None = None
    """For ``learn``: a product of this line whose model is leant on, where the photographs become likelier by it."""
    alone: bool = False
    """For ``try``: it judges in place of the present model, and its verdicts are marked as a trial's."""


class PossiblePromise(msgspec.Struct, frozen=True, kw_only=True):
    """What a number of good parts would allow to promise at best."""

    parts: int
    promised: float
    """At most this share of good parts rejected, with 95% confidence, if none of these is."""


class LearningProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far learning has come."""

    stage: str
    """For people."""
    done: float
    """0..1."""
    left_s: float | None
    """Seconds left, about; None: not known yet."""
    memory_mib: float


class TrialStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A trial."""

    alone: bool
    found: Disagreement | None = None
    """Beside the present model: in how many verdicts the two differ."""
    problem: str | None = None


class MarkedParts(msgspec.Struct, frozen=True, kw_only=True):
    """How many parts people marked."""

    good: int = 0
    bad: int = 0


class ProductTeaching(msgspec.Struct, frozen=True, kw_only=True):
    """How a product that is taught stands."""

    product: str
    camera: str
    stage: Literal["collecting", "stopped", "learning", "learnt", "trying", "live"]
    created: dt.datetime
    frame: tuple[int, int] | None
    """Width and height of what was collected."""
    camera_frame: tuple[int, int] | None
    """And of what the camera gives now."""
    region: Rectangle | None
    collecting: bool
    num_parts: int
    """Good ones, that would be learnt from."""
    photographs: tuple[TakenPhotograph, ...]
    refused: tuple[RefusedPicture, ...]
    num_refused: int
    num_passed_over: int
    """Parts that came while one was being written, since the start."""
    promises: tuple[PossiblePromise, ...]
    learning: LearningProgress | None
    priors: tuple[str, ...]
    """Products of this line whose models can be leant on."""
    marked: MarkedParts
    """Marks of this product, to learn from."""
    learnt: TaughtModel | None
    is_outdated: bool
    """Whether photographs or region have changed since it was learnt."""
    promise: str | None
    """Of the threshold chosen: what to expect and the promise, one sentence; null before it is learnt."""
    trial: TrialStatus | None
    live: tuple[LiveModel, ...]
    before: str | None
    problem: str | None
    notes: tuple[str, ...]
    """What is worth knowing, for people."""


class TeachingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All products that are taught at a line."""

    products: tuple[ProductTeaching, ...]
    frames: dict[str, tuple[int, int]]
    """Width and height of what each camera gives now."""
    damaged: dict[str, str] = {}
    """What is wrong with the records that cannot be read, by product."""
