"""The figures of a simulation, each measured once and kept; together they are ``metrics.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgeflame.errors import StorageError
from edgeflame.simulated import MeasureAnswer
from edgeflame.statedir import storage_errors, write_durably

METRICS = "metrics.json"


class Figures:
    """A folder of figures.

    Raises:
        StorageError: here and in every method, when the disk fails or a file is damaged.
    """

    def __init__(self, out_dir: Path) -> None:
        self._out_dir = out_dir
        self._folder = out_dir / "figures"
        with storage_errors(self._folder, "create"):
            self._folder.mkdir(exist_ok=True)

    def has_round(self, number: int) -> bool:
        """Whether the global model of a round is measured; 0 is the initial one."""
        return self._round(number).exists()

    def keep_round(self, number: int, answer: MeasureAnswer) -> None:
        self._keep(self._round(number), answer)

    def has_site(self, site: str) -> bool:
        """Whether a site's final model is measured."""
        return self._site(site).exists()

    def keep_site(self, answer: MeasureAnswer) -> None:
        self._keep(self._site(answer.name), answer)

    def write_all(self, sites: Sequence[str]) -> dict[str, Any]:
        """Write ``metrics.json``: the rounds in order, then the sites."""
        rounds = sorted(int(path.stem[6:]) for path in self._folder.glob("round-*.json"))
        every = {
            "rounds": [{"round": number, **self._read(self._round(number))} for number in rounds],
            "sites": {site: self._read(self._site(site)) for site in sites if self.has_site(site)},
        }
        write_durably(self._out_dir / METRICS, msgspec.json.format(msgspec.json.encode(every), indent=1) + b"\n")
        return every

    def _round(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.json"

    def _site(self, site: str) -> Path:
        return self._folder / f"site-{site}.json"

    def _keep(self, path: Path, answer: MeasureAnswer) -> None:
        record = {"figures": answer.figures, "classes": answer.classes}
        write_durably(path, msgspec.json.encode(record))

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            with storage_errors(path, "read"):
                return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            msg = f"{path}: damaged ({exc}); delete it to have it measured again"
            raise StorageError(msg) from exc
