"""How a product that is taught stands, put together from its record and what goes on. Pure."""

from __future__ import annotations

from typing import Literal

from edge.inspector import Inspector, InspectorProtocol
from edge.teaching.going_live import other_size
from edge.teaching.look import chosen_promise
from edge.teaching.orders import LearningProgress, MarkedParts, PossiblePromise, ProductTeaching, TrialStatus
from edge.teaching.record import TeachingRecord
from fitting.scores import FitScores

STEPS = (30, 60, 120)
"""Numbers of parts that are counted towards."""
CONFIDENCE = 0.95
NOTHING_MARKED = MarkedParts()
SMALL = 0.5
"""A region smaller than this share of what the base network looks at is told of."""

Stage = Literal["collecting", "stopped", "learning", "learnt", "trying", "live"]


def standing_of(
    record: TeachingRecord,
    *,
    scores: FitScores | None,
    inspector: InspectorProtocol | None,
    camera_frame: tuple[int, int] | None,
    num_passed_over: int,
    learning: LearningProgress | None,
    trial: TrialStatus | None,
    marked: MarkedParts = NOTHING_MARKED,
    priors: tuple[str, ...] = (),
) -> ProductTeaching:
    """How a product stands.

    Args:
        record: the product's.
        scores: of the model learnt last; None: there is none.
        inspector: the camera's, now; None: there is no such camera.
        camera_frame: width and height of what the camera gives; None: nothing yet.
        num_passed_over: parts that came while one was being written.
        learning: how far learning has come; None: it is not being learnt.
        trial: None: it is not being tried.
        marked: how many parts of it people marked.
        priors: products whose models can be leant on.
    """
    notes = []
    if camera_frame is not None and record.frame is not None and camera_frame != record.frame:
        notes.append(other_size(record, camera_frame))
    if scores is not None and not record.is_outdated:
        value = scores.threshold.value
        notes += [
            f"{', '.join(one.photographs[:3])} moves the threshold by itself, from {one.without:.4g} to {value:.4g}: "
            "is that a good part?"
            for one in scores.moving[:3]
        ]
    if (small := _small_region(record, inspector)) is not None:
        notes.append(small)
    return ProductTeaching(
        product=record.product,
        camera=record.camera,
        stage=_stage(record, inspector, learning, trial),
        created=record.created,
        frame=record.frame,
        camera_frame=camera_frame,
        region=record.region,
        collecting=record.collecting,
        num_parts=record.num_parts,
        photographs=record.photographs,
        refused=record.refused,
        num_refused=record.num_refused,
        num_passed_over=num_passed_over,
        promises=tuple(PossiblePromise(parts=count, promised=_tightest(count)) for count in STEPS),
        learning=learning,
        priors=priors,
        marked=marked,
        learnt=record.learnt,
        is_outdated=record.is_outdated,
        promise=None if record.learnt is None or scores is None else chosen_promise(scores, record.learnt.chosen),
        trial=trial,
        live=record.live,
        before=record.before,
        problem=record.problem,
        notes=tuple(notes),
    )


def _stage(
    record: TeachingRecord,
    inspector: InspectorProtocol | None,
    learning: LearningProgress | None,
    trial: TrialStatus | None,
) -> Stage:
    if learning is not None:
        return "learning"
    if trial is not None:
        return "trying"
    if record.collecting:
        return "collecting"
    learnt, live = record.learnt, record.live
    if live and inspector is not None and inspector.product == record.product:
        is_newer = learnt is not None and learnt.at > live[0].since
        return "learnt" if is_newer else "live"
    return "stopped" if learnt is None else "learnt"


def _small_region(record: TeachingRecord, inspector: InspectorProtocol | None) -> str | None:
    """That the base network of the camera's package looks at far more pixels than the region has; None if not."""
    width, height = record.region[2:] if record.region is not None else record.frame or (0, 0)
    if not isinstance(inspector, Inspector) or not width:
        return None
    size = inspector.package.manifest.learning.input
    if min(width, height) >= SMALL * min(size.width, size.height):
        return None
    return (
        f"the region has {width}x{height} pixels, and the base network looks at {size.width}x{size.height}: it would "
        "be blown up, and fine defects are not in it; use a larger region, or bring the camera nearer"
    )


def _tightest(count: int) -> float:
    """The least rate that so many parts without a rejection can promise: 1 - (1 - y)^(1/m)."""
    return float(1.0 - (1.0 - CONFIDENCE) ** (1.0 / count))
