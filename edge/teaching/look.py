"""What a person looks at before a model goes live: pictures of photographs, and what a threshold promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import cv2
import msgspec
import numpy as np

from edge.overlay import draw_overlay
from edge.teaching.record import THUMB_SIDE, TeachingRecord
from edgeflame.errors import DataError, StorageError
from edgeflame.images import ImageU8, read_image, shrink
from edgeflame.package import read_package, rewrite_package
from fitting.scores import FitScores, ThresholdChoice, read_scores

PictureKind = Literal["photographs", "refused", "heat"]
_NAME = re.compile(r"[0-9]{1,9}\.(png|jpg)", re.ASCII)


def as_jpeg(image: ImageU8, side: int) -> bytes:
    """An image as JPEG, at most ``side`` pixels long."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(shrink(image, side)), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return data.tobytes()


def photograph_jpeg(record: TeachingRecord, folder: Path, kind: PictureKind, name: str, *, side: int) -> bytes | None:
    """A photograph, one that was refused, or one with the heat map of the model learnt; None if there is none.

    Args:
        record: the product's.
        folder: the product's.
        kind: which of these.
        name: its file name.
        side: longest side in pixels.
    """
    if _NAME.fullmatch(name) is None:
        return None
    path = folder / ("photographs" if kind == "heat" else kind) / name
    try:
        if kind == "photographs" and side <= THUMB_SIDE:
            # Reading the whole photograph takes a core a tenth of a second.
            return (folder / "thumbs" / f"{name}.jpg").read_bytes()
        image = read_image(path)
        return as_jpeg(_with_heat(record, folder, image, name) if kind == "heat" else image, side)
    except (DataError, StorageError, OSError):
        return None


def _with_heat(record: TeachingRecord, folder: Path, image: ImageU8, name: str) -> ImageU8:
    learnt = record.learnt
    scores = None if learnt is None else read_scores((folder / learnt.file).with_suffix(".json"))
    if learnt is None or scores is None:
        return image
    if learnt.region is not None:
        x, y, width, height = learnt.region
        image = image[y : y + height, x : x + width]
    one = next((one for one in scores.photographs if one.name == name), None)
    if one is None or not one.map:
        return image
    shown = np.array(one.map, dtype=np.float32)
    return draw_overlay(shrink(image, 960), shown, learnt.chosen or learnt.threshold, shown=shown)


def chosen_promise(scores: FitScores, chosen: float | None) -> str:
    """What to expect of the threshold and what it promises, in one sentence."""
    threshold = scores.threshold
    if chosen is not None and (choice := _choice(scores, chosen)) is not None:
        threshold = msgspec.structs.replace(
            threshold,
            value=choice.value,
            false_reject_rate=choice.promised,
            expected_false_reject_rate=choice.expected,
            chosen_by="expected",
        )
    words = threshold.promise()
    return f"{words[0].upper()}{words[1:]}."


def with_threshold(source: Path, target: Path, scores: FitScores, chosen: float) -> None:
    """Write a package again with another of the thresholds that its scores offer.

    Raises:
        DataError: it is none of them.
        EdgeFlameError: the package cannot be read or written.
    """
    choice = _choice(scores, chosen)
    if choice is None:
        raise DataError(f"{chosen:g} is none of the thresholds that the photographs' scores offer")
    package = read_package(source)
    manifest = package.manifest
    threshold = msgspec.structs.replace(
        manifest.threshold,
        value=choice.value,
        false_reject_rate=choice.promised,
        expected_false_reject_rate=choice.expected,
        chosen_by="expected",
        with_more_parts=None,
    )
    rewrite_package(
        target,
        package,
        manifest=msgspec.structs.replace(
            manifest,
            threshold=threshold,
            provenance={**manifest.provenance, "chosen": {"previous_threshold": manifest.threshold.value}},
        ),
    )


def _choice(scores: FitScores, chosen: float) -> ThresholdChoice | None:
    return next((one for one in scores.choices if one.value == chosen), None)
