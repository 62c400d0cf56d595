"""What is known of a fleet's releases and lines, from what is retained on its broker. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from edgeflame.errors import FederationError
from edgeflame.messages import MAX_MESSAGE_BYTES
from edgeflame.releases.messages import LineModels, ProductModels, Release, decode_line_models, decode_release
from edgeflame.topics import Spoken, Topics

Until = Literal["checked", "running"]
"""What is waited for: a line has the package whole and found it good (``checked``), or judges with it (``running``)."""

_GOOD_FATES = ("running", "confirmed")
_CHECKED_STAGES = ("shadow", "waiting")


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How far one line is with one release."""

    line: str
    word: str
    """A stage, a fate, or ``not_heard_of``, ``announced``, ``other_product``."""
    done: int = 0
    total: int = 0
    detail: str = ""
    is_over: bool = False
    """Nothing more is waited for."""
    is_good: bool = False
    """What was waited for has come."""

    def in_words(self) -> str:
        """For people."""
        how_far = f" {self.done}/{self.total}" if self.total else ""
        return f"{self.word.replace('_', ' ')}{how_far}" + (f": {self.detail}" if self.detail else "")


class _Online(msgspec.Struct):
    online: bool = False


class FleetModels:
    """Releases and lines; give it messages with :meth:`take`.

    Args:
        topics: the fleet's.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self.releases: dict[str, Release] = {}
        """By product."""
        self.lines: dict[str, LineModels] = {}
        self.online: dict[str, bool] = {}
        self.num_unreadable = 0

    def filters(self) -> tuple[str, ...]:
        """What to subscribe to."""
        return (
            self._topics.all_releases(),
            self._topics.all_line_models(),
            f"{self._topics.base}/line/+/state",
        )

    def take(self, topic: str, payload: bytes) -> None:
        """A message came."""
        if not payload:
            return
        match topic.removeprefix(f"{self._topics.base}/").split("/"):
            case ["line", line, "state"] if len(payload) <= MAX_MESSAGE_BYTES:
                try:
                    self.online[line] = msgspec.json.decode(payload, type=_Online).online
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    self.num_unreadable += 1
                return
        try:
            match self._topics.parse(topic):
                case Spoken(kind="release", product=str(product)):
                    self.releases[product] = decode_release(payload, product)
                case Spoken(kind="line_models", line=str(line)):
                    self.lines[line] = decode_line_models(payload)
                case _:
                    pass
        except FederationError:
            self.num_unreadable += 1

    def lines_of(self, product: str) -> tuple[str, ...]:
        """Who runs a product."""
        return tuple(sorted(line for line, models in self.lines.items() if models.of(product) is not None))

    def standing(self, line: str, release: Release, until: Until) -> Standing:
        """How far a line is."""
        models = self.lines.get(line)
        if models is None:
            return Standing(line=line, word="not_heard_of")
        entry = models.of(release.product)
        if entry is None:
            products = ", ".join(one.product for one in models.products) or "nothing"
            detail = f"the line runs {products}"
            return Standing(line=line, word="other_product", detail=detail, is_over=True)
        return _standing(line, entry, release.release, until)

    def as_data(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "fleet": self._topics.fleet,
            "unreadable_messages": self.num_unreadable,
            "releases": [
                {
                    "product": one.product,
                    "release": one.release,
                    "sha256": one.manifest.sha256,
                    "size_bytes": one.manifest.size_bytes,
                    "key": one.key,
                    "name": one.name,
                    "published": one.published,
                    "lines": one.lines,
                    "shadow_parts": one.shadow_parts,
                    "withdrawn": one.withdrawn,
                }
                for _, one in sorted(self.releases.items())
            ],
            "lines": [
                {"line": line, "online": self.online.get(line, False), "products": models.products}
                for line, models in sorted(self.lines.items())
            ],
        }


def _standing(line: str, entry: ProductModels, release: str, until: Until) -> Standing:
    outcome = entry.outcome(release)
    if outcome is not None:
        is_good = outcome.fate in _GOOD_FATES
        reason = "" if outcome.reason is None else outcome.reason.replace("_", " ")
        detail = "" if is_good else ": ".join(text for text in (reason, outcome.detail) if text)
        return Standing(line=line, word=outcome.fate, detail=detail, is_over=True, is_good=is_good)
    candidate = entry.candidate
    if candidate is None or candidate.release != release:
        return Standing(line=line, word="announced")
    is_good = until == "checked" and candidate.stage in _CHECKED_STAGES
    # A line that waits for a person's word will not run it while somebody waits for the line.
    is_over = is_good or candidate.stage == "waiting"
    return Standing(
        line=line,
        word=candidate.stage,
        done=candidate.done,
        total=candidate.total,
        detail=candidate.detail,
        is_over=is_over,
        is_good=is_good,
    )


def unfinished(standings: Sequence[Standing]) -> tuple[str, ...]:
    """Who is still waited for."""
    return tuple(one.line for one in standings if not one.is_over)
