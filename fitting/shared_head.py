"""A head that the sites of a fleet learn together, from marks that no site shows another.

What travels is the head's numbers (:func:`fitting.head_training.initial_parameters`), in coordinates that mean the same
at every site: cells about the site's own means, whitened by the site's own covariance without turning the channels. So
what differs between cameras and products stays at the site, and goes into the bias of the head in its own package.

A round (:func:`train_round`) is a few steps of L-BFGS from the fleet's head, held near it, on the site's good cells and
those of its marked bad parts, if it has any. A quarter of the parts (:func:`judging`), good and bad, is never learnt
from. They judge in the end (:func:`judge`) whether and with what weight the fleet's head counts at the site:

- it must not call most of the site's own good parts bad, as a head does that was poisoned or learnt from wrong marks;
- with a threshold set by the other good parts, it must not have more of them rejected than were to be expected, beyond
  chance;
- where the site has enough marked bad parts among them, they choose the weight as in :mod:`fitting.defect_head`;
  otherwise it is ``DEFAULT_WEIGHT``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from edgeflame.errors import FederationError, NumericalError, StorageError
from edgeflame.log import EventLog
from edgeflame.state import atomic_write
from edgeflame.statistics.head import SPACE_KEY
from edgeflame.statistics.moments import one_blas_thread
from edgeflame.tensors import F32, F64
from fitting.crossfit import make_folds
from fitting.defect_head import (
    ALIKE_GAIN,
    MIN_BAD_PARTS,
    WEIGHTS,
    HeadFit,
    fused_scores,
    mean_over,
    placements,
)
from fitting.head_training import (
    MEMBERS,
    UNITS,
    Coordinates,
    HeadImages,
    cells_to_learn,
    fit_layers,
    initial_parameters,
    layers_of,
)

log = EventLog("head")

STEPS, PULL = 30, 0.003
"""Of a round: most steps, and what holds the site's head near the fleet's (FedProx)."""
FOLDS = 4
"""One of so many folds of the parts judges, and is not learnt from."""
MIN_JUDGING = 3
"""Good parts that judge: of fewer a threshold cannot be said to reject too many."""
DEFAULT_WEIGHT = 0.5
"""Of a head at a site that cannot choose by its own marks."""
MOST_CALLED_BAD = 0.5
"""Share of a site's good parts."""
CHANCE = 0.01
"""Less likely than this is not chance."""


@dataclass(frozen=True, kw_only=True)
class SharedHead:
    """A head as it travels.

    Attributes:
        parameters: flat, float32; see :func:`fitting.head_training.initial_parameters`.
        num_channels: C.
        marked: share of what was averaged that learnt from marks; 0: nobody has marked anything.
        space: SHA-256 of what decides on the embeddings.
    """

    parameters: F32
    num_channels: int
    marked: float
    space: str


def initial_head(num_channels: int, *, space: str, seed: int) -> SharedHead:
    """What all sites start from."""
    parameters = initial_parameters(num_channels, np.random.default_rng(seed)).astype(np.float32)
    return SharedHead(parameters=parameters, num_channels=num_channels, marked=0.0, space=space)


def _shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return {"weights": (channels, UNITS), "bias": (UNITS,), "out": (UNITS,), "offset": (MEMBERS,), "marked": (1,)}


def write_head(path: Path, head: SharedHead) -> None:
    """Write a head as safetensors; the same head gives the same bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    shapes = _shapes(head.num_channels)
    values = np.concatenate([head.parameters, np.array([head.marked], dtype=np.float32)])
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    tensors = {
        name: np.ascontiguousarray(part.reshape(shape))
        for (name, shape), part in zip(shapes.items(), np.split(values, ends), strict=True)
    }
    atomic_write(path, safetensors.numpy.save(tensors, metadata={SPACE_KEY: head.space}), durable=False)


def read_head(path: Path, *, num_channels: int) -> SharedHead:
    """Read what :func:`write_head` wrote.

    Raises:
        FederationError: it is no head for so many channels, or holds NaN.
        StorageError: the file cannot be read.
    """
    try:
        with safetensors.safe_open(str(path), framework="numpy") as stream:
            space = (stream.metadata() or {}).get(SPACE_KEY, "")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (FileNotFoundError, PermissionError) as exc:
        raise StorageError(f"{path}: cannot read the fleet's head ({exc})") from exc
    except (safetensors.SafetensorError, OSError, ValueError) as exc:
        raise FederationError(f"{path}: no head, or damaged ({exc})") from exc
    found = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    wanted = {name: (shape, np.dtype(np.float32)) for name, shape in _shapes(num_channels).items()}
    if found != wanted:
        raise FederationError(f"{path}: no head for embeddings of {num_channels} channels")
    values: F32 = np.concatenate([tensors[name].ravel() for name in wanted])
    if not np.isfinite(values).all():
        raise FederationError(f"{path}: the head holds NaN or infinite values")
    return SharedHead(parameters=values[:-1], num_channels=num_channels, marked=float(values[-1]), space=str(space))


def judging(groups: Sequence[str], seed: int) -> npt.NDArray[np.bool_]:
    """Which images judge and are not learnt from: those of a quarter of the parts, always the same, ``[N]``."""
    held = np.zeros(len(groups), dtype=bool)
    if len(set(groups)) >= FOLDS:
        held[make_folds(groups, FOLDS, seed)[0]] = True
    return held


def train_round(
    head: SharedHead, coordinates: Coordinates, good: HeadImages, bad: HeadImages, *, seed: int
) -> tuple[SharedHead, float]:
    """A site's round.

    Args:
        head: the fleet's.
        coordinates: of the site, symmetric.
        good: the site's good images; those that judge are left out here.
        bad: its marked ones, likewise; may be none.
        seed: of the parts that judge.

    Returns:
        The site's head, and the penalised loss with which it began, the mean over members.

    Raises:
        NumericalError: the head is not finite any more.
    """
    good_held, bad_held = judging_both(good, bad, seed)
    learn_good, learn_bad = (
        images.subset(np.flatnonzero(~held)) for images, held in ((good, good_held), (bad, bad_held))
    )
    with one_blas_thread():
        # The same cells in every round: a site's objective does not change.
        cells = cells_to_learn(coordinates, learn_good, learn_bad, np.random.default_rng(seed))
        start = head.parameters.astype(np.float64)
        found, loss = fit_layers(cells, start, steps=STEPS, pull=PULL)
    if not np.isfinite(found).all():
        raise NumericalError("the head is not finite after training")
    trained = replace(head, parameters=found.astype(np.float32), marked=float(len(learn_bad) > 0))
    return trained, loss / MEMBERS


def judge(
    head: SharedHead,
    coordinates: Coordinates,
    good: HeadImages,
    bad: HeadImages,
    *,
    grid: tuple[int, int],
    rate: float,
    seed: int,
) -> HeadFit:
    """Decide by the parts that were not learnt from whether and how much the fleet's head counts at a site.

    Args:
        head: the fleet's.
        coordinates: of the site.
        good: all its good images, with held-out scores.
        bad: all its marked ones.
        grid: of the embeddings.
        rate: share of the good that may be rejected.
        seed: as in :func:`train_round`.
    """
    without = HeadFit(head=None, good_scores=good.scores, bad_scores=bad.scores)
    if head.marked <= 0:
        return _no_head(without, "nobody in the fleet has marked a bad part")
    layers = layers_of(head.parameters, head.num_channels)
    with one_blas_thread():
        good_logits, bad_logits = layers.logits(coordinates, good), layers.logits(coordinates, bad)
    held, bad_held = judging_both(good, bad, seed)
    num_judging = len({good.groups[int(index)] for index in np.flatnonzero(held)})
    if num_judging < MIN_JUDGING:
        return _no_head(
            without, f"{len(set(good.groups))} good parts are too few: a quarter judges it, at least {MIN_JUDGING}"
        )
    if not held.all():
        # Of what was learnt from, a head says too much good; a new part is like those that judge.
        good_logits[~held] += max(0.0, float(np.median(good_logits[held]) - np.median(good_logits[~held])))
    offset = float(head.parameters[-MEMBERS:].mean())
    called = float((good_logits[held] + offset > 0).mean())
    details: dict[str, Any] = {
        "num_judging_good": int(held.sum()),
        "num_judging_bad": int(bad_held.sum()),
        "good_called_bad": round(called, 4),
    }
    if called > MOST_CALLED_BAD:
        return _no_head(without, f"it calls {called:.0%} of this site's good images bad", details)
    centre, deviation = float(good_logits.mean()), float(good_logits.std())
    if not deviation > 1e-6:
        return _no_head(without, "it says the same of every image", details)
    spread = float(np.log(good.scores).std())

    def fused(images: HeadImages, logits: F64, weight: float) -> F64:
        return fused_scores(images.scores, logits, weight * spread / deviation, centre)

    judged_bad = bad.subset(np.flatnonzero(bad_held))
    weight = DEFAULT_WEIGHT
    chosen_by = "default"
    if len(set(judged_bad.groups)) >= MIN_BAD_PARTS:
        chosen_by = "own marks"
        judged_good = good.subset(np.flatnonzero(held))
        base = placements(judged_good.scores, judged_bad.scores)
        tried = []
        for one in WEIGHTS:
            after = placements(fused(judged_good, good_logits[held], one), fused(judged_bad, bad_logits[bad_held], one))
            gain, error = mean_over(after - base, judged_bad.groups, [kind or "?" for kind in judged_bad.kinds])
            tried.append((one, gain, error))
        details["tried"] = [{"weight": one, "gain": round(gain, 4)} for one, gain, _ in tried]
        usable = [one for one in tried if one[1] >= 0]
        if not usable:
            return _no_head(without, "it tells this site's own held-out marks from good parts worse", details)
        _, most, error = max(usable, key=lambda one: one[1])
        weight = next(one for one, gain, _ in usable if gain >= most - ALIKE_GAIN * error)
    scores = fused(good, good_logits, weight)
    rejected, allowed = _rejected(scores[held], scores[~held], rate)
    details |= {"judging_rejected": rejected, "judging_rejected_allowed": allowed}
    if rejected > max(allowed, _rejected(good.scores[held], good.scores[~held], rate)[0]):
        return _no_head(without, f"{rejected} of {int(held.sum())} good images that judge would be rejected", details)
    scale = weight * spread / deviation
    made = layers.as_head(coordinates, grid=grid, scale=scale, centre=centre)
    details |= {"weight": weight, "weight_chosen_by": chosen_by}
    log.info("fleet_head", **{key: str(value) for key, value in details.items()})
    return HeadFit(head=made, good_scores=scores, bad_scores=fused(bad, bad_logits, weight), details=details)


def judging_both(good: HeadImages, bad: HeadImages, seed: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    held = judging(good.groups, seed)
    # A part may have good and bad pictures: both judge, or neither.
    parts = {good.groups[int(index)] for index in np.flatnonzero(held)}
    learnt = set(good.groups) - parts
    bad_held = judging(bad.groups, seed)
    return held, np.array(
        [group in parts or (own and group not in learnt) for group, own in zip(bad.groups, bad_held, strict=True)],
        dtype=bool,
    )


def _rejected(judged: F64, others: F64, rate: float) -> tuple[int, int]:
    """How many of the judged a threshold rejects that the others set, and how many may be by chance."""
    threshold = float(np.quantile(others, 1 - rate, method="higher"))
    count, n = int((judged > threshold).sum()), len(judged)
    share = max(rate, 2 / (len(others) + 1))
    tail, allowed = 1.0, 0
    while allowed < n:
        tail -= comb(n, allowed) * share**allowed * (1 - share) ** (n - allowed)
        if tail < CHANCE:
            break
        allowed += 1
    return count, allowed


def _no_head(without: HeadFit, reason: str, details: dict[str, Any] | None = None) -> HeadFit:
    log.warning("fleet_head_not_used", reason=reason)
    return replace(without, details={**(details or {}), "weight": 0.0, "no_head": reason})
