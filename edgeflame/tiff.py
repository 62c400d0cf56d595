"""How the data of a TIFF lie in its file, and whether they unpack to what they should (TIFF 6.0, BigTIFF).

libtiff notices most damage, and OpenCV lets it pass: it reads samples of 8 bits by an interface that goes on after
errors. Rows of 16 bits it reads by another that does not, so the packed strips are handed to it once more as such rows.
Deflate has a checksum, which is looked at here; JPEG has libjpeg. In data that are not packed, only their place tells.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, CHANNELS, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 277, 278, 279, 284
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, SAMPLE_FORMAT, JPEG_TABLES = 322, 323, 324, 325, 339, 347
SUBFILE_TYPE, OLD_SUBFILE_TYPE = 254, 255

NOT_PACKED, LZW, JPEG, PACK_BITS = 1, 5, 7, 32773
DEFLATE = (8, 32946)

_FORMS = {1: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}
"""Types of values that are read: bytes and whole numbers, by their letter for :mod:`struct`."""
_YCBCR, _FLOAT = 6, 3
_HEAD_BYTES = 8
_COPY_OR_MASK, _OLD_COPY = 0b101, 2
MAX_DIRECTORIES = 1000
"""Directories of a file that are looked into; each may lie anywhere in it."""


@dataclass(frozen=True, kw_only=True)
class TiffLayout:
    """The first picture of a TIFF.

    Attributes:
        width: pixels.
        height: pixels.
        bits: of a sample.
        is_float: whether samples are floating point.
        compression: code of the packing.
        pieces: offset and length of each strip or tile, packed.
        piece_bytes: length of each, unpacked; 0 where that is not known.
        full_bytes: length of a whole one, unpacked.
        piece_pixels: pixels of a whole one: a tile may be larger than its picture.
        jpeg_tables: what the JPEG pieces have in common.
        num_pages: pictures in the file; smaller copies of one, and masks, do not count.
    """

    width: int
    height: int
    bits: int
    is_float: bool
    compression: int
    pieces: tuple[tuple[int, int], ...]
    piece_bytes: tuple[int, ...]
    full_bytes: int
    piece_pixels: int
    jpeg_tables: bytes
    num_pages: int = 1

    def is_cut_short(self, data: bytes) -> bool:
        """Whether a piece reaches beyond the end of the file."""
        if not self.pieces:
            return True
        is_plain = self.compression == NOT_PACKED
        return any(
            offset + (unpacked if is_plain and unpacked else length) > len(data)
            for (offset, length), unpacked in zip(self.pieces, self.piece_bytes, strict=True)
        )

    def damage(self, data: bytes) -> str | None:
        """What is wrong with the packed data; None if nothing, or where nothing tells."""
        if self._overlap():
            return "two strips lie in the same place, or one in the file's head"
        if self.compression not in (LZW, PACK_BITS, *DEFLATE) or not all(self.piece_bytes):
            return None
        try:
            if self.compression == LZW:
                is_sound = self._unpacks_as_lzw(data)
            else:
                unpack = _deflated_length if self.compression in DEFLATE else _pack_bits_length
                # A last strip may be filled up to the length of the others.
                is_sound = all(
                    unpack(packed, self.full_bytes + 1) in (least, self.full_bytes)
                    for packed, least in zip(self._packed(data), self.piece_bytes, strict=True)
                )
        except zlib.error as exc:
            return str(exc)
        return None if is_sound else "a strip does not unpack to its length"

    def jpegs(self, data: bytes) -> Iterator[bytes]:
        """The pieces as JPEGs, if they are."""
        if self.compression == JPEG:
            start = self.jpeg_tables[:-2] if self.jpeg_tables else b"\xff\xd8"
            yield from (start + packed[2:] for packed in self._packed(data))

    def _overlap(self) -> bool:
        """Whether a strip begins where another lies; of packed ones, whose length some programs overstate, begins."""
        is_plain = self.compression == NOT_PACKED
        end = _HEAD_BYTES
        for (start, _), unpacked in sorted(zip(self.pieces, self.piece_bytes, strict=True)):
            if start < end:
                return True
            end = start + (unpacked if is_plain and unpacked else 1)
        return False

    def _packed(self, data: bytes) -> Iterator[bytes]:
        return (data[offset : offset + length] for offset, length in self.pieces)

    def _unpacks_as_lzw(self, data: bytes) -> bool:
        """Whether each piece unpacks to its length and no more."""
        pieces = list(zip(self._packed(data), self.piece_bytes, strict=True))
        for size in set(self.piece_bytes):
            if not _unpack_to([packed for packed, least in pieces if least == size], size, self.compression):
                return False
        for packed, least in pieces:
            longer = [size for size in (least, self.full_bytes) if _unpack_to([packed], size + 2, self.compression)]
            if self.full_bytes in longer or (longer and not _unpack_to([packed], self.full_bytes, self.compression)):
                return False
        return True


def _unpack_to(pieces: Sequence[bytes], size: int, compression: int) -> bool:
    """Whether all pieces unpack to this length (but for an odd byte) or more, read by libtiff as rows of a picture."""
    if size < 2:
        return True
    picture = _rows_of_16_bits(pieces, width=size // 2, compression=compression)
    try:
        return cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_UNCHANGED) is not None
    except cv2.error:
        return False


def read_tiff(data: bytes) -> TiffLayout | None:
    """How the first picture of a TIFF lies in its file; None if it is no TIFF, or one that cannot be understood."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        first = _Tags(data, order)
        return replace(_layout(first), num_pages=_num_pages(data, order, first))
    except (struct.error, IndexError, KeyError):
        return None


def _num_pages(data: bytes, order: str, first: _Tags) -> int:
    """The first picture, and each further directory that is neither a smaller copy nor a mask."""
    count, tags, seen = 1, first, {first.start}
    while tags.next and tags.next not in seen and len(seen) < MAX_DIRECTORIES:
        seen.add(tags.next)
        try:
            tags = _Tags(data, order, tags.next)
        except struct.error:
            # What is said to follow is not there; the first picture is whole.
            break
        count += not (tags.number(SUBFILE_TYPE, 0) & _COPY_OR_MASK or tags.number(OLD_SUBFILE_TYPE, 0) == _OLD_COPY)
    return count


class _Tags:
    """A directory of a TIFF, the first one unless its place is given: whole numbers and bytes by their tags.

    ``start`` is its place, ``next`` that of the one after it; 0: there is none.

    Raises:
        struct.error: it reaches beyond the file, as in :meth:`numbers`.
    """

    def __init__(self, data: bytes, order: str, place: int | None = None) -> None:
        self._data = data
        self._order = order
        version, start = self._unpack("HI", 2)
        self._is_big = version == 43
        if self._is_big:
            (start,) = self._unpack("Q", 8)
        elif version != 42:
            raise KeyError(version)
        self.start = start = start if place is None else place
        (count,) = self._unpack("Q" if self._is_big else "H", start)
        start += 8 if self._is_big else 2
        size = 20 if self._is_big else 12
        self._entries: dict[int, tuple[int, int, int]] = {}
        for position in range(start, start + min(count, 4096) * size, size):
            tag, kind, number = self._unpack("HHQ" if self._is_big else "HHI", position)
            self._entries.setdefault(tag, (kind, number, position + (12 if self._is_big else 8)))
        end = start + count * size
        has_next = end + (8 if self._is_big else 4) <= len(data)
        self.next: int = self._unpack("Q" if self._is_big else "I", end)[0] if has_next else 0

    def numbers(self, tag: int) -> tuple[int, ...]:
        """All values of a tag; none if it is not there or of another kind."""
        kind, count, position = self._entries.get(tag, (0, 0, 0))
        letter = _FORMS.get(kind)
        if letter is None:
            return ()
        size = count * struct.calcsize(letter)
        if size > (8 if self._is_big else 4):
            (position,) = self._unpack("Q" if self._is_big else "I", position)
        if size > len(self._data):
            raise struct.error("the values reach beyond the file")
        return self._unpack(f"{count}{letter}", position)

    def number(self, tag: int, default: int) -> int:
        """The first value of a tag, or the default."""
        return next(iter(self.numbers(tag)), default)

    def _unpack(self, form: str, position: int) -> tuple[int, ...]:
        if position > len(self._data):
            raise struct.error("the directory reaches beyond the file")
        return struct.unpack_from(self._order + form, self._data, position)


def _layout(tags: _Tags) -> TiffLayout:
    width, height = tags.number(WIDTH, 0), tags.number(HEIGHT, 0)
    bits, channels = tags.number(BITS, 1), tags.number(CHANNELS, 1)
    compression, is_planar = tags.number(COMPRESSION, NOT_PACKED), tags.number(PLANAR, 1) == 2
    planes, channels = (channels, 1) if is_planar else (1, channels)
    offsets, lengths = tags.numbers(TILE_OFFSETS), tags.numbers(TILE_BYTES)
    if offsets:
        piece_width, piece_height = tags.number(TILE_WIDTH, 0), tags.number(TILE_HEIGHT, 0)
        across = -(-width // max(1, piece_width))
    else:
        offsets, lengths = tags.numbers(STRIP_OFFSETS), tags.numbers(STRIP_BYTES)
        piece_width, piece_height = width, min(height, tags.number(ROWS_PER_STRIP, height))
        across = 1
    down = -(-height // max(1, piece_height))
    count = across * down * planes
    if count > len(offsets):
        offsets = ()
    offsets, lengths = offsets[:count], lengths[:count]
    is_tiled = bool(tags.numbers(TILE_OFFSETS))
    row_bytes = (piece_width * bits * channels + 7) // 8
    if tags.number(PHOTOMETRIC, 0) == _YCBCR:
        # Colours may be stored for fewer pixels than brightness.
        row_bytes = 0
    rows = [
        piece_height if is_tiled else min(piece_height, height - index % down * piece_height)
        for index in range(len(offsets))
    ]
    return TiffLayout(
        width=width,
        height=height,
        bits=bits,
        is_float=tags.number(SAMPLE_FORMAT, 1) == _FLOAT,
        compression=compression,
        pieces=tuple(zip(offsets, lengths, strict=True)) if len(lengths) == len(offsets) else (),
        piece_bytes=tuple(row_bytes * number for number in rows) if len(lengths) == len(offsets) else (),
        full_bytes=row_bytes * piece_height,
        piece_pixels=piece_width * piece_height,
        jpeg_tables=bytes(tags.numbers(JPEG_TABLES)),
    )


def _deflated_length(packed: bytes, most: int) -> int:
    """Length of the unpacked data, ``most`` at most; their checksum must be right."""
    inflate = zlib.decompressobj()
    length = len(inflate.decompress(packed, most))
    if length < most and not inflate.eof:
        raise zlib.error("the packed data end too soon")
    return length


def _pack_bits_length(packed: bytes, most: int) -> int:
    position = length = 0
    while position < len(packed) and length < most:
        head = packed[position]
        # Up to 127: as many bytes and one more as they are; from 129: the next byte, 257 less that number of times.
        length += head + 1 if head < 128 else 257 - head if head > 128 else 0
        position += head + 2 if head < 128 else 2 if head > 128 else 1
    return length


def _rows_of_16_bits(rows: Sequence[bytes], *, width: int, compression: int) -> bytes:
    """A TIFF whose rows are packed already, one in each strip."""
    out = bytearray(b"II*\0" + bytes(4))
    lengths = [len(row) for row in rows]
    offsets = [8, *(8 + end for end in itertools.accumulate(lengths))][:-1]
    out += b"".join(rows)
    entries = [(WIDTH, width), (HEIGHT, len(rows)), (BITS, 16), (COMPRESSION, compression), (PHOTOMETRIC, 1)]
    entries += [(CHANNELS, 1), (ROWS_PER_STRIP, 1)]
    lists = {STRIP_OFFSETS: offsets, STRIP_BYTES: lengths}
    for tag, values in lists.items():
        place = values[0]
        if len(values) > 1:
            place = len(out)
            out += struct.pack(f"<{len(values)}I", *values)
        entries.append((tag, place))
    out[4:8] = struct.pack("<I", len(out))
    out += struct.pack("<H", len(entries))
    for tag, value in sorted(entries):
        out += struct.pack("<HHII", tag, 4, len(lists.get(tag, [0])), value)
    return bytes(out + bytes(4))
