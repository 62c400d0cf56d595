"""The messages about released packages, between publishers and the lines of a fleet.

The publisher of a package sends :class:`Release`; a line answers with its :class:`LineModels` and, for the bytes, with
:class:`~edgeflame.mqtt.messages.BlobNeed`. :class:`Release` and :class:`LineModels` are retained, so that a line that
was off learns of a release when it comes back, and everyone can read what every line runs without asking the lines.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from edgeflame.errors import FederationError
from edgeflame.mqtt.messages import (
    BlobManifest,
    BlobNeed,
    Count,
    Id,
    Name,
    Sha256,
    Text,
    WireMessage,
    Word,
    decode_message,
)

MAX_SHADOW_PARTS = 100_000
MAX_LINES = 1000
MAX_PRODUCTS = 64
MAX_OUTCOMES = 20
"""How many of the last releases a line reports the outcome of, for a product."""

Product = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
KeyId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]

ReleaseStage = Literal["fetching", "checking", "shadow", "waiting"]
"""Where a candidate is; ``waiting`` for a person's word."""
ReleaseFate = Literal["running", "confirmed", "refused", "rolled_back", "withdrawn", "superseded"]
"""What became of a release on a line: ``running`` on trial, then ``confirmed``; ``superseded``: by another, before it
ran."""


class Release(WireMessage, frozen=True, kw_only=True, tag="release"):
    """A package for all lines that run its product, or for some; retained."""

    release: Id
    """The id of this act of publishing: the same package published again on purpose has another."""
    product: Product
    manifest: BlobManifest
    """The package file; its SHA-256 is the package's name."""
    key: KeyId
    """The key that signed it, unverified: a line verifies with the keys it trusts."""
    name: Text = ""
    """What people call it: the file's name."""
    published: datetime
    """When it was published by the publisher's clock, UTC; for people."""
    lines: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_LINES)] = ()
    """The lines that are to take it; empty for every line that runs the product."""
    shadow_parts: Annotated[int, msgspec.Meta(ge=0, le=MAX_SHADOW_PARTS)] = 0
    """The least number of parts for which it runs in shadow; a line may ask for more, never for less."""
    withdrawn: bool = False
    """Take it back: drop it, and roll back where it runs."""


class RunningModel(msgspec.Struct, frozen=True, kw_only=True):
    """A package that a line runs, or ran."""

    sha256: Sha256
    origin: Literal["file", "release"]
    """``file``: one that the line's own configuration names."""
    name: Text = ""
    release: Id | None = None
    since: datetime | None = None
    on_trial: bool = False
    """It runs since a switch, and is rolled back by itself if it proves bad."""


class Disagreement(msgspec.Struct, frozen=True, kw_only=True):
    """Two models on the same parts."""

    parts: Count = 0
    """Parts that both models judged."""
    differing: Count = 0
    """Parts of these on which the verdicts differ."""
    newly_failed: Count = 0
    """Passed by the present model, failed by the other."""
    newly_passed: Count = 0
    """Failed by the present model, passed by the other."""
    share: Fraction | None = None
    """``differing / parts``; None before the first part."""
    upper: Fraction | None = None
    """Upper end of the 95% confidence interval of the share."""
    correlation: Annotated[float, msgspec.Meta(ge=-1.000001, le=1.000001)] | None = None
    """Spearman's, of the two scores; None where it is not defined."""
    skipped: Count = 0
    """Parts that only the present model judged, because the other was still busy."""
    faults: Count = 0
    """Parts on which the other model failed: exceptions, scores that are no finite numbers."""
    slowdown: Finite | None = None
    """Its computing time for a part over the present one's, both measured alternately."""


class CandidateModel(msgspec.Struct, frozen=True, kw_only=True):
    """A release that does not run yet."""

    release: Id
    sha256: Sha256
    name: Text = ""
    stage: Word
    """A :data:`ReleaseStage`, or one of a later version."""
    done: Count = 0
    total: Count = 0
    """Chunks while fetching, parts in shadow."""
    detail: Text = ""
    disagreement: Disagreement | None = None


class ReleaseOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a release on a line."""

    release: Id
    sha256: Sha256
    name: Text = ""
    fate: Word
    """A :data:`ReleaseFate`, or one of a later version."""
    reason: Word | None = None
    """Why it was refused or rolled back, in a word; ``detail`` says it in words."""
    detail: Text = ""
    at: datetime
    disagreement: Disagreement | None = None


class ProductModels(msgspec.Struct, frozen=True, kw_only=True):
    """One product on a line."""

    product: Product
    present: RunningModel
    previous: Annotated[tuple[RunningModel, ...], msgspec.Meta(max_length=MAX_OUTCOMES)] = ()
    """What can be rolled back to, newest first; the last is the configuration's file."""
    candidate: CandidateModel | None = None
    outcomes: Annotated[tuple[ReleaseOutcome, ...], msgspec.Meta(max_length=MAX_OUTCOMES)] = ()
    """Newest first."""

    def outcome(self, release: str) -> ReleaseOutcome | None:
        """What became of a release; None if it is not known."""
        return next((one for one in self.outcomes if one.release == release), None)


class LineModels(WireMessage, frozen=True, kw_only=True, tag="line_models"):
    """Which packages a line runs, tries and has refused; retained."""

    boot: Id
    products: Annotated[tuple[ProductModels, ...], msgspec.Meta(max_length=MAX_PRODUCTS)] = ()

    def of(self, product: str) -> ProductModels | None:
        """One product; None if the line does not run it."""
        return next((one for one in self.products if one.product == product), None)


_RELEASE = msgspec.json.Decoder(Release)
_LINE_MODELS = msgspec.json.Decoder(LineModels)
_NEED = msgspec.json.Decoder(BlobNeed)


def decode_release(data: bytes, product: str) -> Release:
    """Decode a retained announcement.

    Args:
        data: anything.
        product: the one of the topic it came on.

    Raises:
        FederationError: not a release, or of another product.
    """
    release = decode_message(_RELEASE, data)
    if release.product != product:
        raise FederationError(f"a release of {release.product[:80]!r} on the topic of {product[:80]!r}")
    return release


def decode_line_models(data: bytes) -> LineModels:
    """Decode the retained message about a line's models; errors as :func:`decode_message`."""
    return decode_message(_LINE_MODELS, data)


def decode_need(data: bytes) -> BlobNeed:
    """Decode a line's request for the chunks that it lacks of a package; errors as :func:`decode_message`."""
    return decode_message(_NEED, data)
