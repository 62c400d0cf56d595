"""Where a key pair lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Keys:
    """A key pair in a folder."""

    folder: Path

    @property
    def private(self) -> Path:
        return self.folder / "edgeflame-key.pem"

    @property
    def public(self) -> Path:
        return self.folder / "edgeflame-key.pub"
