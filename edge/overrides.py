"""What was changed by command and outlives a restart: thresholds and products. One small file in the state folder.

A threshold is a raw distance of one model and means nothing to another, so it is kept by model.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import msgspec

from edgeflame.errors import StorageError
from edgeflame.statedir import storage_errors, write_durably

FILE = "commanded.json"


class CameraOverrides(msgspec.Struct, frozen=True, kw_only=True):
    """Of one camera."""

    product: str | None = None
    thresholds: dict[str, float] = {}
    """By the model's id."""


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    cameras: dict[str, CameraOverrides] = {}


@final
class Overrides:
    """The file; for one thread at a time.

    Args:
        folder: the state folder; None: nothing is kept beyond this run.

    Raises:
        StorageError: the file is there and cannot be read, or is none of ours.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / FILE
        self._cameras: dict[str, CameraOverrides] = {}
        if self._file is not None and self._file.exists():
            with storage_errors(self._file, "read what was changed by command"):
                data = self._file.read_bytes()
            try:
                self._cameras = dict(msgspec.json.decode(data, type=_Document).cameras)
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                msg = (
                    f"{self._file}: damaged ({exc}); delete it to go on with the thresholds and products of the "
                    "configuration"
                )
                raise StorageError(msg) from exc

    def of(self, camera: str) -> CameraOverrides:
        """What was changed of a camera."""
        return self._cameras.get(camera, CameraOverrides())

    def set_threshold(self, camera: str, model: str, value: float | None) -> None:
        """Keep a model's threshold, or forget it.

        Raises:
            StorageError: it cannot be kept; nothing is changed then.
        """
        thresholds = {**self.of(camera).thresholds}
        thresholds.pop(model, None)
        if value is not None:
            thresholds[model] = value
        self._keep(camera, msgspec.structs.replace(self.of(camera), thresholds=thresholds))

    def set_product(self, camera: str, product: str | None) -> None:
        """Keep a camera's product, or forget it; raises as :meth:`set_threshold`."""
        self._keep(camera, msgspec.structs.replace(self.of(camera), product=product))

    def _keep(self, camera: str, entry: CameraOverrides) -> None:
        cameras = {**self._cameras, camera: entry}
        if self._file is not None:
            with storage_errors(self._file.parent, "keep what was changed by command"):
                self._file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._file, msgspec.json.encode(_Document(cameras=cameras)))
        self._cameras = cameras
