"""What is said about released packages: who publishes one says :class:`Release`, a line answers with its
:class:`LineModels` and, for the bytes, with :class:`~edgeflame.messages.BlobNeed`.

Both are retained, so that a line that was off learns of a release when it comes back, and whoever asks learns what
every line runs without asking the lines. Versions and rules are those of :mod:`edgeflame.messages`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from edgeflame.errors import FederationError
from edgeflame.messages import BlobNeed, Count, Id, Name, Sha256, Text, WireMessage, Word, decode_message
from edgeflame.transfer.manifest import Manifest

MAX_SHADOW_PARTS = 100_000
MAX_LINES = 1000
MAX_PRODUCTS = 64
MAX_OUTCOMES = 20
"""Of a product on a line: what became of the last releases."""

Product = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
KeyId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]

Stage = Literal["fetching", "checking", "shadow", "waiting"]
"""Where a candidate is; ``waiting`` for a person's word."""
Fate = Literal["running", "confirmed", "refused", "rolled_back", "withdrawn", "superseded"]
"""What became of a release on a line: ``running`` on trial, then ``confirmed``; ``superseded``: by another, before it
ran."""


class Release(WireMessage, frozen=True, kw_only=True, tag="release"):
    """A package for all lines that run its product, or for some; retained."""

    release: Id
    """Of this act of publishing: the same package published again on purpose has another."""
    product: Product
    manifest: Manifest
    """Of the package file; its SHA-256 is the package's name."""
    key: KeyId
    """Who signed it, unverified: a line verifies with the keys it trusts."""
    name: Text = ""
    """What people call it: the file's name."""
    published: datetime
    """By the publisher's clock, UTC; for people."""
    lines: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_LINES)] = ()
    """Who is to take it; nobody named: every line that runs the product."""
    shadow_parts: Annotated[int, msgspec.Meta(ge=0, le=MAX_SHADOW_PARTS)] = 0
    """For so many parts it is to run beside the present one, at least; a line may ask for more, never for less."""
    withdrawn: bool = False
    """Take it back: drop it, and roll back where it runs."""


class RunningModel(msgspec.Struct, frozen=True, kw_only=True):
    """A package that a line runs, or ran."""

    sha256: Sha256
    origin: Literal["file", "release"]
    """``file``: of the line's own configuration."""
    name: Text = ""
    release: Id | None = None
    since: datetime | None = None
    on_trial: bool = False
    """It runs since a switch, and is rolled back by itself if it proves bad."""


class Disagreement(msgspec.Struct, frozen=True, kw_only=True):
    """Two models on the same parts."""

    parts: Count = 0
    """Judged by both."""
    differing: Count = 0
    """Of these, parts with two verdicts."""
    newly_failed: Count = 0
    """Passed by the present model, failed by the other."""
    newly_passed: Count = 0
    """Failed by the present model, passed by the other."""
    share: Share | None = None
    """``differing / parts``; None before the first part."""
    upper: Share | None = None
    """Upper end of the 95% confidence interval of the share."""
    correlation: Annotated[float, msgspec.Meta(ge=-1.000001, le=1.000001)] | None = None
    """Spearman's, of the two scores; None where it is not defined."""
    skipped: Count = 0
    """Parts that only the present model judged, because the other was still busy."""
    faults: Count = 0
    """Of the other model: exceptions, scores that are no finite numbers."""
    slowdown: Finite | None = None
    """Its computing time for a part over the present one's, both measured alternately."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A release that does not run yet."""

    release: Id
    sha256: Sha256
    name: Text = ""
    stage: Word
    """A :data:`Stage`, or one of a later version."""
    done: Count = 0
    total: Count = 0
    """Chunks while fetching, parts in shadow."""
    detail: Text = ""
    disagreement: Disagreement | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a release on a line."""

    release: Id
    sha256: Sha256
    name: Text = ""
    fate: Word
    """A :data:`Fate`, or one of a later version."""
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
    candidate: Candidate | None = None
    outcomes: Annotated[tuple[Outcome, ...], msgspec.Meta(max_length=MAX_OUTCOMES)] = ()
    """Newest first."""

    def outcome(self, release: str) -> Outcome | None:
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
        FederationError: it is none, or of another product.
    """
    release = decode_message(_RELEASE, data)
    if release.product != product:
        msg = f"a release of {release.product[:80]!r} on the topic of {product[:80]!r}"
        raise FederationError(msg)
    return release


def decode_line_models(data: bytes) -> LineModels:
    """Decode what a line says of its models; errors as :func:`~edgeflame.messages.decode_up`."""
    return decode_message(_LINE_MODELS, data)


def decode_need(data: bytes) -> BlobNeed:
    """Decode what a line lacks of a package; errors as :func:`~edgeflame.messages.decode_up`."""
    return decode_message(_NEED, data)
