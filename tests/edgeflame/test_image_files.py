"""Image files as cameras, phones and disks leave them: damaged, padded, huge, and of formats that are not read."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from boards.dataset import BoardStream
from edgeflame.dataset import list_images
from edgeflame.errors import DataError
from edgeflame.image_files import look_through
from edgeflame.images import decode_image, read_samples
from edgeflame.tiff import read_tiff
from tests.support.paths import REPOSITORY

PACKINGS = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", None)


@pytest.fixture(scope="module")
def board() -> np.ndarray:
    """``[200, 256, 3]``, BGR."""
    stream = BoardStream(texture="warm_wood", seed=0, defect_rate=1.0, num_parts=1, image_size=256)
    return next(iter(stream)).image_bgr[:200]


def encode(image: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[..., ::-1])).save(out, kind, **options)
    return out.getvalue()


def holed(data: bytes, start: int, length: int = 200) -> bytes:
    return data[:start] + bytes(length) + data[start + length :]


@pytest.mark.parametrize("packing", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_tiff_with_a_hole_in_its_packed_data_is_refused_where_opencv_fills_it(
    board: np.ndarray, packing: str
) -> None:
    data = encode(board, "TIFF", compression=packing)
    np.testing.assert_array_equal(decode_image(data, "whole"), board)
    for start in range(1000, len(data) - 2000, 4001):
        with pytest.raises(DataError, match="damaged"):
            decode_image(holed(data, start), "holed")


def test_a_tiff_of_jpegs_is_refused_where_libjpeg_finds_a_hole(board: np.ndarray) -> None:
    data = encode(board, "TIFF", compression="jpeg", quality=95)
    assert decode_image(data, "whole").shape == board.shape
    starts = range(2000, len(data) - 3000, 997)
    refused = 0
    for start in starts:
        try:
            decode_image(holed(data, start, 1024), "holed")
        except DataError:
            refused += 1
    assert refused == len(starts)


@pytest.mark.parametrize("suffix", ["big", "tiled", "planar", "deep", "predicted"])
def test_tiffs_of_every_layout_are_read_and_their_holes_found(board: np.ndarray, suffix: str, tmp_path: Path) -> None:
    picture, options = board, {}
    if suffix == "deep":
        picture = board.astype(np.uint16) * 257
    data = tiff_by_hand(picture, layout=suffix)
    layout = read_tiff(data)
    assert layout is not None
    assert (layout.width, layout.height) == (256, 200)
    np.testing.assert_array_equal(decode_image(data, "whole", **options), board)
    offset, length = layout.pieces[1]
    with pytest.raises(DataError, match="damaged"):
        decode_image(holed(data, offset + length // 2, 64), "holed")


def tiff_by_hand(image: np.ndarray, *, layout: str) -> bytes:
    """A TIFF packed by deflate: big (BigTIFF), tiled, planar, of 16 bits, or with differences (predictor 2)."""
    height, width, _ = image.shape
    rgb = image[..., ::-1]
    if layout == "predicted":
        rgb = np.diff(rgb, axis=1, prepend=np.zeros((height, 1, 3), np.uint8))
    if layout == "tiled":
        padded = np.zeros((256, 256, 3), np.uint8)
        padded[:height] = rgb
        pieces = [padded[y : y + 64, x : x + 64] for y in range(0, 256, 64) for x in range(0, 256, 64)]
    elif layout == "planar":
        pieces = [rgb[y : y + 64, :, channel] for channel in range(3) for y in range(0, height, 64)]
    else:
        pieces = [rgb[y : y + 64] for y in range(0, height, 64)]
    packed = [zlib.compress(np.ascontiguousarray(piece).tobytes()) for piece in pieces]
    is_big = layout == "big"
    out = bytearray(b"II+\0\x08\0\0\0" + bytes(8) if is_big else b"II*\0" + bytes(4))
    offsets = []
    for piece in packed:
        offsets.append(len(out))
        out += piece
    bits = 8 * image.itemsize
    tags: dict[int, list[int]] = {
        256: [width], 257: [height], 258: [bits] * 3, 259: [8], 262: [2], 277: [3],
        284: [2 if layout == "planar" else 1], 317: [2 if layout == "predicted" else 1],
    }  # fmt: skip
    sizes = [len(piece) for piece in packed]
    tags |= (
        {322: [64], 323: [64], 324: offsets, 325: sizes} if layout == "tiled" else {273: offsets, 278: [64], 279: sizes}
    )
    entries = b""
    word, pointer = ("<HHQ", "<Q") if is_big else ("<HHI", "<I")
    for tag, values in sorted(tags.items()):
        body = struct.pack(f"<{len(values)}I", *values)
        if len(body) > struct.calcsize(pointer):
            place, out = len(out), out + body
            body = struct.pack(pointer, place)
        entries += struct.pack(word, tag, 4, len(values)) + body.ljust(struct.calcsize(pointer), b"\0")
    start = len(out)
    out[8 if is_big else 4 : 16 if is_big else 8] = struct.pack(pointer, start)
    return bytes(out + struct.pack("<Q" if is_big else "<H", len(tags)) + entries + bytes(8))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_tiff_with_its_directory_in_front_is_refused_when_cut_short(board: np.ndarray, packing: str | None) -> None:
    data = encode(board, "TIFF", **({"compression": packing} if packing else {}))
    layout = read_tiff(data)
    assert layout is not None
    for share in (0.99, 0.9, 0.5):
        with pytest.raises(DataError, match=r"cut short|not an image"):
            decode_image(data[: int(len(data) * share)], "part")


def test_a_png_is_refused_by_its_checksums_without_a_word_of_libpng(
    board: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    data = encode(board, "PNG")
    for start in range(50, len(data) - 20, 3001):
        flipped = data[:start] + bytes([data[start] ^ 0x10]) + data[start + 1 :]
        with pytest.raises(DataError, match=r"damaged|cut short"):
            decode_image(flipped, "flipped")
    assert capfd.readouterr().err == ""


FLOAT_TIFF = """
import cv2, numpy as np, sys
from edgeflame.errors import DataError
from edgeflame.images import decode_image, read_samples
for data in (cv2.imencode(".tiff", np.zeros((8, 8, 3), np.float32))[1].tobytes(), bytes.fromhex(sys.argv[1])):
    try:
        decode_image(data, "part")
    except DataError as exc:
        print(exc)
"""


def test_opencv_prints_nothing_of_its_own(board: np.ndarray) -> None:
    """In a process of its own, as OpenCV writes past Python."""
    lzw = encode(board[:40, :40], "TIFF", compression="tiff_lzw")
    run = subprocess.run(
        [sys.executable, "-c", FLOAT_TIFF, holed(lzw, len(lzw) // 2, 100).hex()],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert run.stdout.splitlines()[0] == "part: expected 8 or 16 bit samples, got float32"
    assert "damaged" in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize("tail", [bytes(5000), b"\0\0\0\x18ftypmp42" + bytes(range(1, 200)) * 600, b"x" * 100_000])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_follows_the_end_of_a_whole_picture_is_ignored(board: np.ndarray, kind: str, tail: bytes) -> None:
    data = encode(board, kind)
    np.testing.assert_array_equal(decode_image(data + tail, "padded"), decode_image(data, "whole"))


def test_the_end_of_a_thumbnail_is_not_that_of_its_photograph(board: np.ndarray) -> None:
    thumbnail = encode(board[:40, :40], "JPEG")
    photo = encode(board, "JPEG")
    segment = b"Exif\0\0" + thumbnail
    data = photo[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + photo[2:]
    np.testing.assert_array_equal(decode_image(data, "whole"), decode_image(photo, "photo"))
    for cut in (data[:-100], data[: len(data) // 2], data[: len(segment) + 100], data[:-100] + bytes(8000)):
        with pytest.raises(DataError, match=r"cut short|damaged"):
            decode_image(cut, "part")


@pytest.mark.parametrize("num_scans", [1, 2, 4, 9])
def test_a_progressive_jpeg_that_was_closed_after_some_scans_is_refused(board: np.ndarray, num_scans: int) -> None:
    data = encode(board, "JPEG", progressive=True)
    starts = [found.start() for found in re.finditer(b"\xff\xda", data)]
    assert decode_image(data, "whole").shape == board.shape
    with pytest.raises(DataError, match="scans are missing"):
        decode_image(data[: starts[num_scans]] + b"\xff\xd9", "part")


def test_the_scan_of_a_baseline_jpeg_may_claim_any_coefficients(board: np.ndarray) -> None:
    data = bytearray(encode(board, "JPEG"))
    end_of_header = data.find(b"\xff\xda") + 2 + 12
    data[end_of_header - 3 : end_of_header] = bytes(3)
    assert decode_image(bytes(data), "a camera's").shape == board.shape


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["pipe", "device", "nowhere", "folder"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "part.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.symlink_to(tmp_path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    if kind != "folder":
        assert list_images(tmp_path) == [path]
    with pytest.raises(DataError, match="cannot be read"):
        read_samples(path)


def huge(kind: str) -> bytes:
    """30000 x 30000 pixels, of one colour or claimed."""
    if kind == "PNG":
        rows = zlib.compressobj(9)
        body = b"".join(rows.compress(bytes(1 + 30000 // 8 + 1)) for _ in range(30000)) + rows.flush()
        head = b"".join(number.to_bytes(4, "big") for number in (30000, 30000)) + bytes([1, 0, 0, 0, 0])

        def chunk(name: bytes, data: bytes) -> bytes:
            return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    out = io.BytesIO()
    small = Image.new("L", (16, 16))
    if kind == "TIFF":
        image = Image.new("1", (30000, 30000))
        image.save(out, "TIFF", compression="group4")
        return out.getvalue()
    small.save(out, kind)
    data = bytearray(out.getvalue())
    if kind == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = (30000).to_bytes(2, "big") * 2
    elif kind == "BMP":
        data[18:26] = (30000).to_bytes(4, "little") * 2
    else:
        assert kind == "WEBP"
        data[26:30] = (16383).to_bytes(2, "little") * 2
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_a_huge_picture_is_refused_before_it_is_decoded(kind: str) -> None:
    data = huge(kind)
    assert len(data) < 2_000_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"pixels are more than the 100 megapixels that may be decoded"):
            decode_image(data, "huge")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_the_bound_on_pixels_can_be_set(board: np.ndarray) -> None:
    data = encode(board, "PNG")
    assert decode_image(data, "board", max_pixels=200 * 256).shape == board.shape
    with pytest.raises(DataError, match=r"256x200 pixels are more than the 0\.05 megapixels"):
        decode_image(data, "board", max_pixels=50_000)


def test_a_tile_larger_than_its_picture_counts(board: np.ndarray) -> None:
    data = bytearray(tiff_by_hand(board, layout="tiled"))
    at = data.rindex((322).to_bytes(2, "little") + b"\x04\0\x01\0\0\0") + 8
    data[at : at + 4] = (1 << 24).to_bytes(4, "little")
    with pytest.raises(DataError, match="megapixels"):
        decode_image(bytes(data), "tiled")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (300, 200), (65, 129)])
def test_sizes_are_found_without_decoding(kind: str, size: tuple[int, int]) -> None:
    for mode in ("RGB", "L"):
        out = io.BytesIO()
        Image.new(mode, size, 99 if mode == "L" else (9, 200, 77)).save(out, kind)
        file = look_through(out.getvalue())
        assert file is not None
        assert (file.width, file.height) == size
        assert decode_image(out.getvalue(), "flat").shape == (size[1], size[0], 3)
    if kind == "WEBP":
        out = io.BytesIO()
        Image.new("RGBA", size).save(out, kind, lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
        file = look_through(out.getvalue())
        assert file is not None
        assert (file.width, file.height) == size


def test_formats_that_are_not_read_are_named(board: np.ndarray) -> None:
    for data, name in (
        (encode(board, "GIF"), "GIF"),
        (cv2.imencode(".jp2", board)[1].tobytes(), "JPEG 2000"),
        (encode(board, "AVIF"), "AVIF"),
        (cv2.imencode(".ppm", board)[1].tobytes(), "PNM"),
    ):
        with pytest.raises(DataError, match=f"{name} is not read, only JPEG, PNG, BMP, TIFF and WebP"):
            decode_image(data, "picture")


def animated(board: np.ndarray, kind: str, num_pictures: int = 3) -> bytes:
    pictures = [
        Image.fromarray(np.ascontiguousarray(np.roll(board, 9 * shift, axis=0))) for shift in range(num_pictures)
    ]
    out = io.BytesIO()
    pictures[0].save(out, kind, save_all=True, append_images=pictures[1:])
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_file_of_several_pictures_is_refused_with_their_number(board: np.ndarray, kind: str) -> None:
    with pytest.raises(DataError, match="many: the file has 3 pictures; one is wanted"):
        decode_image(animated(board, kind), "many")
    assert decode_image(animated(board, kind, 1), "one").shape == board.shape


@pytest.mark.parametrize("kind", [1, 4])
def test_smaller_copies_and_masks_in_a_tiff_are_no_pictures(board: np.ndarray, kind: int) -> None:
    copy = Image.fromarray(np.ascontiguousarray(board[::2, ::2]))
    copy.encoderinfo = {"tiffinfo": {254: kind}}
    out = io.BytesIO()
    Image.fromarray(board).save(out, "TIFF", save_all=True, append_images=[copy])
    assert decode_image(out.getvalue(), "pyramid").shape == board.shape


@pytest.mark.parametrize("packing", ["tiff_lzw", "tiff_adobe_deflate", "packbits", None])
@pytest.mark.parametrize("where", ["another strip's place", "the file's head"])
def test_a_tiff_whose_strips_lie_in_one_place_is_refused(board: np.ndarray, packing: str | None, where: str) -> None:
    options = {"compression": packing} if packing else {}
    data = encode(board, "TIFF", tiffinfo={278: 20}, **options)
    layout = read_tiff(data)
    assert layout is not None
    assert len(layout.pieces) == 10
    first, second = (struct.pack("<I", offset) for offset, _ in layout.pieces[:2])
    offsets = struct.pack("<10I", *(offset for offset, _ in layout.pieces))
    assert data.count(offsets) == 1
    moved = offsets.replace(second, first if where == "another strip's place" else bytes(4))
    with pytest.raises(DataError, match="damaged"):
        decode_image(data.replace(offsets, moved), "moved")


def test_directories_of_a_tiff_in_a_ring_are_walked_once(board: np.ndarray) -> None:
    data = bytearray(encode(board, "TIFF"))
    first = int.from_bytes(data[4:8], "little")
    end = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    data[end : end + 4] = data[4:8]
    layout = read_tiff(bytes(data))
    assert layout is not None
    assert layout.num_pages == 1
