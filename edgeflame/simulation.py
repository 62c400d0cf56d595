"""Tasks for simulated sites and their results: JSON, so that an engine may carry them anywhere.

A site's task holds the round state that a fleet's aggregator would publish, and its answer the message that the site
would send over MQTT. Blobs do not travel in chunks; they are read from where they lie. Paths are absolute, on a
file system that all of the engine's processes see.
"""

from __future__ import annotations

import msgspec

from edgeflame.methods import Learning
from edgeflame.mqtt.messages import RefusalReason


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class SiteTask(_Message, frozen=True, kw_only=True, tag="site"):
    """Do a site's part in what is announced."""

    site: str
    data: str
    """Its images."""
    state: str
    """Its state directory."""
    blobs: str
    """The folder of the blobs that ``announced`` names; each file is called by its SHA-256."""
    marks: str | None = None
    """Its folder of marks."""
    shared: str
    """A folder for what is the same at every site, and made only once."""
    announced: msgspec.Raw
    """``edgeflame.mqtt.messages.RoundState``."""
    refused: dict[int, RefusalReason] = {}
    """Why its updates were refused, by the number of the round."""


class MeasureTask(_Message, frozen=True, kw_only=True, tag="measure"):
    """Measure a model on test images."""

    name: str
    learning: Learning
    model: str | None = None
    """The exchanged tensors, safetensors; None: learn first, alone, by a method that needs no fleet."""
    seed: int = 0
    """The seed of that learning."""
    train: tuple[str, ...]
    """Data sets whose good images, pooled, give the statistics."""
    marks: str | None = None
    """Folder of the marks that judge, with ``train``, whether a head counts; None: there are none."""
    test: str
    """The data set whose test part is measured on."""


SimulationTask = SiteTask | MeasureTask


class SiteAnswer(_Message, frozen=True, kw_only=True, tag="site"):
    """A site did its part."""

    site: str
    install: str
    initial: str | None = None
    """SHA-256 of its initial model, once it has one."""
    said: str | None = None
    """``edgeflame.mqtt.messages.UpMessage``, encoded; None if it sends nothing."""
    blob: str | None = None
    """The file that was offered."""


class MeasureAnswer(_Message, frozen=True, kw_only=True, tag="measure"):
    """Figures, fractions of 1; those that are not defined are left out. Where a head may have been learnt from marks,
    there are figures ``..._without_head`` too: the same images by the same statistics alone, with their threshold.
    """

    name: str
    figures: dict[str, float]
    classes: dict[str, dict[str, float]]
    """Figures by defect class."""


class SimulationFailure(_Message, frozen=True, kw_only=True, tag="problem"):
    """An expected error that ends the simulation: the class of ``edgeflame.errors`` and its message."""

    error: str
    message: str


SimulationAnswer = SiteAnswer | MeasureAnswer | SimulationFailure

TASK_DECODER: msgspec.json.Decoder[SimulationTask] = msgspec.json.Decoder(SimulationTask)
ANSWER_DECODER: msgspec.json.Decoder[SimulationAnswer] = msgspec.json.Decoder(SimulationAnswer)
