"""The topic tree of a fleet, and the names that may appear in it.

    edgeflame/v1/<fleet>/aggregator/presence        retained birth, will
    edgeflame/v1/<fleet>/round                      retained: run, round, phase, base model
    edgeflame/v1/<fleet>/site/<site>/presence       retained birth with boot id, will
    edgeflame/v1/<fleet>/site/<site>/up/message     from the site
    edgeflame/v1/<fleet>/site/<site>/up/blob/<sha256>/<chunk>
    edgeflame/v1/<fleet>/site/<site>/down/message   to the site
    edgeflame/v1/<fleet>/blob/<sha256>/<chunk>      from the aggregator to all sites
    edgeflame/v1/<fleet>/status/<name>              retained: one figure or word each, for SCADA systems
    edgeflame/v1/<fleet>/line/<line>/state          retained birth, will: what an inspection daemon runs
    edgeflame/v1/<fleet>/line/<line>/availability   retained, will: "online" or "offline", plain text
    edgeflame/v1/<fleet>/line/<line>/result         one message a part
    edgeflame/v1/<fleet>/line/<line>/trigger        to the line: a part is there
    edgeflame/v1/<fleet>/line/<line>/command        to the line: pause, set the threshold, take a snapshot, ...
    edgeflame/v1/<fleet>/line/<line>/reply          from the line: the result of a command
    edgeflame/v1/<fleet>/line/<line>/models         retained: which packages it runs, tries and refused
    edgeflame/v1/<fleet>/line/<line>/up/message     from the line: what it lacks of a released package
    edgeflame/v1/<fleet>/model/<product>            retained: the package released for a product
    edgeflame/v1/<fleet>/release/<sha256>/<chunk>   from the publisher of a package to all lines

The sender of a message is in its topic, never in a field of it: the broker's access control can tie a topic to
a certificate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote

from edgeflame.errors import UsageError

ROOT = "edgeflame/v1"
MAX_NAME_CHARS = 64

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_CHARS - 1}}}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_INDEX = re.compile(r"0|[1-9][0-9]{0,6}", re.ASCII)


def is_name(text: str) -> bool:
    """Whether a text may name a fleet or a site: a topic level, a file name and a log field without quoting."""
    return _NAME.fullmatch(text) is not None


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256 in lower-case hexadecimal."""
    return _SHA256.fullmatch(text) is not None


def check_name(kind: str, text: str) -> str:
    """``text``, if it may name a ``kind`` (``fleet`` or ``site``).

    Raises:
        UsageError: it may not.
    """
    if not is_name(text):
        raise UsageError(
            f"{kind} name {text[:80]!r}: expected 1 to {MAX_NAME_CHARS} letters, digits, '.', '_' or '-', "
            "the first of them a letter or digit"
        )
    return text


@dataclass(frozen=True, kw_only=True)
class ChunkTopic:
    """A chunk's address; ``site`` is None for one published to all sites, or to all lines."""

    site: str | None
    sha256: str
    index: int
    is_release: bool = False
    """Whether it is a chunk of a package for the lines, not of a model in training."""


@dataclass(frozen=True, kw_only=True)
class MessageTopic:
    """A message's address: what kind of topic it came on, and whose it is."""

    kind: Literal["up", "down", "site_presence", "aggregator_presence", "round", "release", "line_models", "line_up"]
    site: str | None = None
    line: str | None = None
    product: str | None = None


@dataclass(frozen=True, kw_only=True)
class Topics:
    """The topics of one fleet."""

    fleet: str

    def __post_init__(self) -> None:
        check_name("fleet", self.fleet)

    @property
    def base(self) -> str:
        return f"{ROOT}/{self.fleet}"

    @property
    def aggregator_presence(self) -> str:
        return f"{self.base}/aggregator/presence"

    @property
    def round(self) -> str:
        return f"{self.base}/round"

    def site_presence(self, site: str) -> str:
        return f"{self.base}/site/{site}/presence"

    def site_up(self, site: str) -> str:
        return f"{self.base}/site/{site}/up/message"

    def up_chunk(self, site: str, sha256: str, index: int) -> str:
        return f"{self.base}/site/{site}/up/blob/{sha256}/{index}"

    def site_down(self, site: str) -> str:
        return f"{self.base}/site/{site}/down/message"

    def training_chunk(self, sha256: str, index: int) -> str:
        return f"{self.base}/blob/{sha256}/{index}"

    def status(self, name: str) -> str:
        """A tag; plain text."""
        return f"{self.base}/status/{name}"

    def training_chunks(self, sha256: str) -> str:
        """Filter for all chunks of a blob for all sites."""
        return f"{self.base}/blob/{sha256}/+"

    def line_state(self, line: str) -> str:
        return f"{self.base}/line/{line}/state"

    def line_availability(self, line: str) -> str:
        return f"{self.base}/line/{line}/availability"

    def line_result(self, line: str) -> str:
        return f"{self.base}/line/{line}/result"

    def line_command(self, line: str) -> str:
        return f"{self.base}/line/{line}/command"

    def line_reply(self, line: str) -> str:
        return f"{self.base}/line/{line}/reply"

    def line_trigger(self, line: str) -> str:
        return f"{self.base}/line/{line}/trigger"

    def line_models(self, line: str) -> str:
        return f"{self.base}/line/{line}/models"

    def line_up(self, line: str) -> str:
        return f"{self.base}/line/{line}/up/message"

    def release(self, product: str) -> str:
        """Where a product's package is announced; a product may be called anything, a topic level may not."""
        return f"{self.base}/model/{quote(product, safe='')}"

    def all_releases(self) -> str:
        return f"{self.base}/model/+"

    def release_chunk(self, sha256: str, index: int) -> str:
        return f"{self.base}/release/{sha256}/{index}"

    def release_chunks(self, sha256: str) -> str:
        """Filter for all chunks of a released package."""
        return f"{self.base}/release/{sha256}/+"

    def all_line_models(self) -> str:
        return f"{self.base}/line/+/models"

    def all_line_up(self) -> str:
        return f"{self.base}/line/+/up/message"

    def all_up(self) -> str:
        """Filter for everything sites send."""
        return f"{self.base}/site/+/up/#"

    def all_site_presences(self) -> str:
        return f"{self.base}/site/+/presence"

    def parse(self, topic: str) -> ChunkTopic | MessageTopic | None:
        """What a topic addresses; None for one that is not of this fleet's tree."""
        prefix = self.base + "/"
        if not topic.startswith(prefix):
            return None
        match topic[len(prefix) :].split("/"):
            case ["round"]:
                return MessageTopic(kind="round")
            case ["aggregator", "presence"]:
                return MessageTopic(kind="aggregator_presence")
            case ["blob", sha256, index] if is_sha256(sha256) and _INDEX.fullmatch(index):
                return ChunkTopic(site=None, sha256=sha256, index=int(index))
            case ["release", sha256, index] if is_sha256(sha256) and _INDEX.fullmatch(index):
                return ChunkTopic(site=None, sha256=sha256, index=int(index), is_release=True)
            case ["model", product] if product:
                return MessageTopic(kind="release", product=unquote(product, errors="replace"))
            case ["line", line, "models"] if is_name(line):
                return MessageTopic(kind="line_models", line=line)
            case ["line", line, "up", "message"] if is_name(line):
                return MessageTopic(kind="line_up", line=line)
            case ["site", site, "presence"] if is_name(site):
                return MessageTopic(kind="site_presence", site=site)
            case ["site", site, "up", "message"] if is_name(site):
                return MessageTopic(kind="up", site=site)
            case ["site", site, "down", "message"] if is_name(site):
                return MessageTopic(kind="down", site=site)
            case ["site", site, "up", "blob", sha256, index] if (
                is_name(site) and is_sha256(sha256) and _INDEX.fullmatch(index)
            ):
                return ChunkTopic(site=site, sha256=sha256, index=int(index))
            case _:
                return None
