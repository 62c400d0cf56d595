"""Model weights as safetensors files, read and written tensor by tensor, and checked before anything is allocated.

A *canonical* file has its tensors in name order, back to back, and its metadata in key order: the same weights are
the same bytes at every site, so their SHA-256 names them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors

from edgeflame.errors import DataError, EdgeFlameError
from edgeflame.state import storage_errors

MAX_HEADER_BYTES = 8 << 20
"""A tensor takes about 100 bytes of header; this is room for 80,000."""

BLOCK_ELEMENTS = 1 << 18
"""Elements handled at once: 2 MiB in float64, whatever the size of the tensor."""

_DAMAGED = (
    safetensors.SafetensorError,
    msgspec.DecodeError,
    AttributeError,
    KeyError,
    ValueError,
    IndexError,
    TypeError,
    RecursionError,
)
"""What decoding a safetensors file with a header of ours ends in where it is something else, or damaged."""


@contextlib.contextmanager
def decoding(what: str) -> Iterator[None]:
    """Decode a file within; ``what`` it should be is in the error.

    Raises:
        DataError: it is something else, or damaged.
    """
    try:
        yield
    except EdgeFlameError:
        raise
    except _DAMAGED as exc:
        raise DataError(f"not {what}, or damaged ({exc})") from exc


DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("<i1"),
    "U8": np.dtype("<u1"),
    "BOOL": np.dtype("?"),
}
"""Element types a model may have. BF16 is not among them: numpy has none, and no backbone here uses it."""

Array = npt.NDArray[np.generic]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor's element type (a key of ``DTYPES``) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.num_elements * DTYPES[self.dtype].itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("F")


Schema = Mapping[str, TensorSpec]
"""Tensors by name, in name order."""


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class TensorFile:
    """A safetensors file, open for reading; a context manager.

    Args:
        path: the file.

    Raises:
        DataError: not safetensors, cut short, or of element types that are not in ``DTYPES``.
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path, "open"):
            self._stream: BinaryIO = path.open("rb")
        try:
            self._offsets: dict[str, int] = {}
            self.metadata: dict[str, str] = {}
            self.schema: Schema = self._read_header()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Elements ``start`` to ``stop`` of a tensor, flat.

        Raises:
            DataError: the file became shorter since it was opened.
            StorageError: it cannot be read.
        """
        spec = self.schema[name]
        dtype = DTYPES[spec.dtype]
        stop = spec.num_elements if stop is None else min(stop, spec.num_elements)
        with storage_errors(self.path, "read"):
            data = os.pread(
                self._stream.fileno(), (stop - start) * dtype.itemsize, self._offsets[name] + start * dtype.itemsize
            )
        if len(data) != (stop - start) * dtype.itemsize:
            raise DataError(f"{self.path}: cut short")
        return np.frombuffer(data, dtype=dtype)

    def blocks(self, name: str, elements: int = BLOCK_ELEMENTS) -> Iterator[Array]:
        """A tensor's elements, flat, at most ``elements`` at once."""
        for start, stop in block_ranges(self.schema[name], elements):
            yield self.read(name, start, stop)

    def _read_header(self) -> Schema:
        with storage_errors(self.path, "read"):
            size = os.fstat(self._stream.fileno()).st_size
            length = int.from_bytes(self._stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise DataError(f"{self.path}: not a safetensors file (a header of {length} bytes in a file of {size})")
            header = self._stream.read(length)
        try:
            raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
            if "__metadata__" in raw:
                self.metadata = msgspec.json.decode(raw.pop("__metadata__"), type=dict[str, str])
            entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise DataError(f"{self.path}: not a safetensors file ({exc})") from exc
        begin = 8 + length
        schema: dict[str, TensorSpec] = {}
        expected = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].data_offsets, item[0])):
            if entry.dtype not in DTYPES:
                raise DataError(
                    f"{self.path}: tensor {name[:100]!r} is of type {entry.dtype[:20]!r}; known are {', '.join(DTYPES)}"
                )
            if any(not 0 <= extent <= size for extent in entry.shape) or len(entry.shape) > 16:
                raise DataError(f"{self.path}: tensor {name[:100]!r} has the impossible shape {list(entry.shape)[:16]}")
            spec = TensorSpec(dtype=entry.dtype, shape=entry.shape)
            # Tensors lie back to back and fill the file: none overlaps, none claims more than is there.
            if entry.data_offsets != (expected, expected + spec.size_bytes):
                raise DataError(f"{self.path}: tensor {name[:100]!r} does not lie where its shape says")
            expected += spec.size_bytes
            schema[name] = spec
            self._offsets[name] = begin + entry.data_offsets[0]
        if not schema or begin + expected != size:
            raise DataError(f"{self.path}: {size} bytes, its header describes {begin + expected}")
        return dict(sorted(schema.items()))


class TensorWriter:
    """Writes a canonical file: every tensor of ``schema``, in name order, in blocks."""

    def __init__(self, stream: BinaryIO, schema: Schema, metadata: Mapping[str, str]) -> None:
        self._stream = stream
        header: dict[str, _Entry | dict[str, str]] = {}
        if metadata:
            header["__metadata__"] = dict(sorted(metadata.items()))
        position = 0
        for name, spec in sorted(schema.items()):
            header[name] = _Entry(spec.dtype, spec.shape, (position, position + spec.size_bytes))
            position += spec.size_bytes
        data = msgspec.json.encode(header)
        # Padded to 8 bytes, as the format asks, so that tensors are aligned in memory maps.
        data += b" " * (-len(data) % 8)
        stream.write(len(data).to_bytes(8, "little") + data)

    def write(self, block: Array) -> None:
        """The next elements, flat, of the type the schema says."""
        self._stream.write(block.tobytes())


def canonicalise(source: Path, target: Path) -> None:
    """Rewrite a safetensors file in canonical form; the two paths differ.

    Raises:
        DataError: ``source`` is not one.
        StorageError: the disk fails.
    """
    with TensorFile(source) as tensors, storage_errors(target, "write"), target.open("wb") as stream:
        writer = TensorWriter(stream, tensors.schema, tensors.metadata)
        for name in tensors.schema:
            for block in tensors.blocks(name):
                writer.write(block)
        stream.flush()
        os.fsync(stream.fileno())


def block_ranges(spec: TensorSpec, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Where a tensor's blocks start and stop, in elements."""
    for start in range(0, spec.num_elements, elements):
        yield start, min(start + elements, spec.num_elements)


def schema_difference(expected: Schema, found: Schema) -> str | None:
    """What differs first, in words; None if nothing does."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"tensor {name!r} is missing"
        if name not in expected:
            return f"tensor {name[:100]!r} is not in the model"
        if expected[name] != found[name]:
            a, b = expected[name], found[name]
            return f"tensor {name!r}: expected {a.dtype} {list(a.shape)}, got {b.dtype} {list(b.shape)}"
    return None
