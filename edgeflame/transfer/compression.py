"""Updates in fewer bytes: what differs from the base model, which both sides have.

==============  =====================================================================================================
``raw``         the file as it is
``float16``     of each float tensor the difference to the base, over the tensor's largest, in float16: half the bytes,
                and an error of 2^-11 of a difference (more for those below 6e-5 of the largest)
``zstd``        the bits that differ from the base (exclusive or), bytes of like place together, compressed: no error
``float16_zstd``  ``float16``, compressed
==============  =====================================================================================================

An encoded update is a safetensors file with the base's tensor names (or that, compressed with Zstandard). What a given
encoded file and base decode to is the same bits everywhere. Nothing that claims another size than the base's tensors
have is inflated: the size of the result is known before the first byte is.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from edgeflame.errors import DataError
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import Codec
from edgeflame.state import storage_errors
from edgeflame.tensors import (
    DTYPES,
    F64,
    MAX_HEADER_BYTES,
    Array,
    Schema,
    TensorFile,
    TensorSpec,
    TensorWriter,
    block_ranges,
    schema_difference,
)

log = EventLog("codec")

FALLBACKS: dict[Codec, Codec] = {"zstd": "raw", "float16_zstd": "float16"}
"""What a site without Zstandard sends instead."""
ZSTD_LEVEL = 3
"""Higher levels gain a few percent on weights, and take several times as long."""
MAX_WINDOW_BYTES = 8 << 20
"""The largest window of a Zstandard frame: what decoding it may allocate."""
_PIECE_BYTES = 1 << 20
_SCALES = "scales"


def has_zstd() -> bool:
    """Whether the package ``zstandard`` is installed."""
    return importlib.util.find_spec("zstandard") is not None


def usable_codec(wanted: str) -> Codec:
    """What to send to a fleet that wants ``wanted``: that, or what can be done without what is missing here."""
    known: dict[str, Codec] = {"raw": "raw", "float16": "float16", "zstd": "zstd", "float16_zstd": "float16_zstd"}
    codec = known.get(wanted, "raw")
    if codec in FALLBACKS and not has_zstd():
        codec = FALLBACKS[codec]
    if codec != wanted:
        log.warning("codec_unavailable", wanted=wanted, used=codec)
    return codec


def encode_update(codec: Codec, base: Path, update: Path, out: Path) -> float:
    """Write an update in another form.

    Args:
        codec: not ``raw``.
        base: the model the update was trained from.
        update: with the same tensors.
        out: where to write; ``out`` with the ending ``.plain`` is used as well, and removed.

    Returns:
        The error: the distance of what it will decode to from the update, over the length of the update's change.

    Raises:
        DataError: the files are not what they should be.
        StorageError: the disk fails.
    """
    plain = out.with_name(out.name + ".plain")
    with TensorFile(base) as before, TensorFile(update) as after:
        if difference := schema_difference(before.schema, after.schema):
            raise DataError(f"{update}: not an update of this base: {difference}")
        lossy = codec.startswith("float16")
        scales = {name: _largest(before, after, name) for name in _floats(before.schema)} if lossy else {}
        metadata = {**after.metadata, _SCALES: msgspec.json.encode(scales).decode()} if lossy else after.metadata
        error = change = 0.0
        with storage_errors(plain, "write"), plain.open("wb") as stream:
            writer = TensorWriter(stream, _encoded_schema(before.schema, lossy=lossy), metadata)
            for name, old, new in _pairs(before, after):
                if name not in scales:
                    writer.write(new if lossy else _shuffle(old, new))
                    continue
                delta = _difference(old, new)
                packed = _pack(delta, scales[name])
                writer.write(packed)
                kept = _difference(new, _unpack(old, packed, scales[name]))
                error += float(np.dot(kept, kept))
                change += float(np.dot(delta, delta))
    with storage_errors(out, "write"):
        if codec.endswith("zstd"):
            _compress(plain, out)
            plain.unlink()
        else:
            plain.replace(out)
    return math.sqrt(error / change) if change else 0.0


def decode_update(codec: Codec, base: Path, encoded: Path, out: Path) -> None:
    """Undo :func:`encode_update`; the bytes need not be trusted.

    Args:
        codec: not ``raw``.
        base: the model the update was trained from.
        encoded: what came.
        out: gets the update, in canonical form; ``out`` with the ending ``.plain`` is used as well, and removed.

    Raises:
        DataError: it is not an encoded update of this base.
        StorageError: the disk fails.
    """
    lossy = codec.startswith("float16")
    plain = out.with_name(out.name + ".plain")
    try:
        with TensorFile(base) as before:
            schema = _encoded_schema(before.schema, lossy=lossy)
            if codec.endswith("zstd"):
                _inflate(encoded, plain, limit=sum(spec.size_bytes for spec in schema.values()) + MAX_HEADER_BYTES + 8)
            with TensorFile(plain if codec.endswith("zstd") else encoded) as packed:
                if difference := schema_difference(schema, packed.schema):
                    raise DataError(difference)
                _decode(before, packed, out, lossy=lossy)
    finally:
        plain.unlink(missing_ok=True)


def _decode(before: TensorFile, packed: TensorFile, out: Path, *, lossy: bool) -> None:
    metadata = dict(packed.metadata)
    scales = _read_scales(metadata.pop(_SCALES, ""), _floats(before.schema)) if lossy else {}
    with storage_errors(out, "write"), out.open("wb") as stream:
        writer = TensorWriter(stream, before.schema, metadata)
        for name, spec in before.schema.items():
            size = DTYPES[spec.dtype].itemsize
            for start, stop in block_ranges(spec):
                old = before.read(name, start, stop)
                if name in scales:
                    writer.write(_unpack(old, packed.read(name, start, stop), scales[name]))
                elif lossy:
                    writer.write(packed.read(name, start, stop))
                else:
                    writer.write(_unshuffle(old, packed.read(name, start * size, stop * size)))


def _read_scales(text: str, names: list[str]) -> dict[str, float]:
    try:
        scales = msgspec.json.decode(text, type=dict[str, float])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f"no readable scales ({exc})") from exc
    if sorted(scales) != sorted(names) or any(not 0 <= scale < math.inf for scale in scales.values()):
        raise DataError("the scales are not one number >= 0 for each float tensor")
    return scales


def _floats(schema: Schema) -> list[str]:
    return [name for name, spec in schema.items() if spec.is_float]


def _encoded_schema(schema: Schema, *, lossy: bool) -> Schema:
    if lossy:
        return {
            name: TensorSpec(dtype="F16", shape=spec.shape) if spec.is_float else spec for name, spec in schema.items()
        }
    return {name: TensorSpec(dtype="U8", shape=(spec.size_bytes,)) for name, spec in schema.items()}


def _pairs(before: TensorFile, after: TensorFile) -> Iterator[tuple[str, Array, Array]]:
    for name in before.schema:
        for old, new in zip(before.blocks(name), after.blocks(name), strict=True):
            yield name, old, new


def _largest(before: TensorFile, after: TensorFile, name: str) -> float:
    largest = 0.0
    for old, new in zip(before.blocks(name), after.blocks(name), strict=True):
        if not np.isfinite(new).all():
            raise DataError(f"{after.path}: tensor {name!r} holds NaN or infinite values")
        largest = max(largest, float(np.abs(_difference(old, new)).max(initial=0.0)))
    return largest


def _difference(old: Array, new: Array) -> F64:
    difference: F64 = new.astype(np.float64) - old.astype(np.float64)
    return difference


def _pack(delta: F64, scale: float) -> Array:
    packed: Array = (delta / (scale or 1.0)).astype(np.float16)
    return packed


def _unpack(old: Array, packed: Array, scale: float) -> Array:
    # Too large a scale overflows to infinity, which is no crash here, and refused by the checks of the update.
    with np.errstate(over="ignore", invalid="ignore"):
        values: Array = (old.astype(np.float64) + packed.astype(np.float64) * scale).astype(old.dtype)
    return values


def _shuffle(old: Array, new: Array) -> Array:
    differing = np.frombuffer(old.tobytes(), np.uint8) ^ np.frombuffer(new.tobytes(), np.uint8)
    shuffled: Array = differing.reshape(-1, old.dtype.itemsize).T.ravel()
    return shuffled


def _unshuffle(old: Array, shuffled: Array) -> Array:
    differing = shuffled.reshape(old.dtype.itemsize, -1).T.ravel()
    return np.frombuffer((np.frombuffer(old.tobytes(), np.uint8) ^ differing).tobytes(), old.dtype)


def _compress(source: Path, target: Path) -> None:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    with source.open("rb") as reader, target.open("wb") as writer:
        compressor.copy_stream(reader, writer, size=source.stat().st_size)


def _inflate(source: Path, target: Path, *, limit: int) -> None:
    with _zstd_reader(source) as reader, storage_errors(target, "write"), target.open("wb") as writer:
        size = 0
        while piece := reader.read(_PIECE_BYTES):
            size += len(piece)
            if size > limit:
                raise DataError(f"inflates to more than {limit} bytes, which is all that its base's tensors can take")
            writer.write(piece)


@contextmanager
def _zstd_reader(source: Path) -> Iterator[BinaryIO]:
    try:
        import zstandard
    except ImportError as exc:
        raise DataError(
            "compressed with Zstandard, which is not installed here (pip install 'edgeflame[zstd]')"
        ) from exc
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    with storage_errors(source, "read"), source.open("rb") as stream:
        try:
            with decompressor.stream_reader(stream) as reader:
                yield reader
        except zstandard.ZstdError as exc:
            raise DataError(f"not Zstandard data ({exc})") from exc
