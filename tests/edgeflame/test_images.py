"""Reading photographs of every mode, refusing what is no photograph, and the shared pre-processing."""

from __future__ import annotations

from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from boards.dataset import BoardStream
from edgeflame.config import load_config
from edgeflame.errors import ConfigError, DataError, StorageError
from edgeflame.images import Preprocessing, Region, decode_image, read_image, read_mask, to_8_bit, write_image
from edgeflame.methods import Learning


def encode(image: np.ndarray, suffix: str) -> bytes:
    ok, data = cv2.imencode(suffix, image)
    assert ok
    return data.tobytes()


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".jpg"])
def test_formats_decode_to_bgr_of_their_size(photo: np.ndarray, suffix: str) -> None:
    smooth = cv2.GaussianBlur(photo, (0, 0), 4)
    image = decode_image(encode(smooth, suffix), "photo")
    assert image.shape == (48, 64, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - smooth).mean() < 6


def test_grey_becomes_three_equal_channels(photo: np.ndarray) -> None:
    image = decode_image(encode(photo[:, :, 0], ".png"), "grey")
    assert np.array_equal(image, np.repeat(photo[:, :, :1], 3, axis=2))


def test_alpha_is_dropped(photo: np.ndarray) -> None:
    rgba = np.dstack([photo, np.full(photo.shape[:2], 7, np.uint8)])
    assert np.array_equal(decode_image(encode(rgba, ".png"), "rgba"), photo)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_is_scaled_by_its_full_range(channels: int) -> None:
    ramp = np.linspace(0, 65535, 48 * 64 * channels).reshape(48, 64, channels).astype(np.uint16)
    image = decode_image(encode(ramp, ".png"), "deep")
    assert image.dtype == np.uint8
    assert image.min() == 0
    assert image.max() == 255
    assert np.abs(image[..., :1].astype(float) - ramp[..., :1] / 257).max() <= 0.5


def test_float_samples_are_refused() -> None:
    with pytest.raises(DataError, match="expected 8 or 16 bit samples"):
        decode_image(encode(np.zeros((8, 8, 3), np.float32), ".tiff"), "float.tiff")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tiff", ".webp"])
def test_a_file_cut_short_is_refused_at_every_length(photo: np.ndarray, suffix: str) -> None:
    data = encode(photo, suffix)
    # The first bytes decide the format; from there to the last byte no prefix may pass as a photograph.
    for length in range(0, len(data) - 2, max(1, len(data) // 150)):
        with pytest.raises(DataError, match=r"cut short|empty|not an image"):
            decode_image(data[:length], "part")


@pytest.mark.parametrize("options", [[], [cv2.IMWRITE_JPEG_RST_INTERVAL, 4]])
def test_a_jpeg_with_a_hole_in_its_data_is_refused_where_opencv_fills_it(photo: np.ndarray, options: list[int]) -> None:
    rng = np.random.default_rng(0)
    lively = np.clip(cv2.resize(photo, (256, 256)).astype(int) + rng.integers(-40, 40, (256, 256, 3)), 0, 255)
    data = cv2.imencode(".jpg", lively.astype(np.uint8), options)[1].tobytes()
    assert decode_image(data, "whole").shape == (256, 256, 3)
    for start in range(len(data) // 4, len(data) - 3000, 997):
        holed = data[:start] + bytes(2048) + data[start + 2048 :]
        with pytest.raises(DataError, match=r"damaged \((Corrupt JPEG data|Premature end)|not an image"):
            decode_image(holed, "holed")


def test_odd_jpegs_that_are_whole_are_read(photo: np.ndarray) -> None:
    data = cv2.imencode(".jpg", photo)[1].tobytes()
    whole = decode_image(data, "whole")
    for odd in (data[:-2] + bytes(4) + data[-2:], data + bytes(500), data[:-2] + b"ab" + data[-2:]):
        np.testing.assert_array_equal(decode_image(odd, "padded"), whole)
    for side in (1, 7):
        small = cv2.imencode(".jpg", photo[:side, :side])[1].tobytes()
        assert decode_image(small, "small").shape == (side, side, 3)
    assert decode_image(cv2.imencode(".jpg", photo[..., 0])[1].tobytes(), "grey").shape == photo.shape


def test_text_is_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("these are not pixels")
    with pytest.raises(DataError, match=r"notes\.png: not an image"):
        read_image(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        read_image(tmp_path / "gone.png")


def test_masks_are_binary(tmp_path: Path) -> None:
    mask = np.zeros((10, 12), np.uint8)
    mask[2:4, 3:7] = 1
    write_image(tmp_path / "mask.png", mask)
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask * 255)


def test_an_image_is_written_whole_or_not_at_all(tmp_path: Path, photo: np.ndarray) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        write_image(tmp_path / "no" / "folder.png", photo)
    write_image(tmp_path / "photo.png", photo)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    assert np.array_equal(read_image(tmp_path / "photo.png"), photo)


def test_preprocessing_crops_and_resizes(photo: np.ndarray) -> None:
    roi = Region(x=8, y=4, width=32, height=40)
    out = Preprocessing(height=32, width=64, roi=roi).apply(photo)
    assert np.array_equal(out, cv2.resize(photo[4:44, 8:40], (64, 32), interpolation=cv2.INTER_AREA))
    assert out.flags.c_contiguous


@pytest.mark.parametrize(
    "size", [(300, 280), (512, 512), (640, 480), (1280, 720), (1280, 1024), (1920, 1080), (2448, 2048)]
)
def test_halving_gives_nearly_the_means_over_areas(size: tuple[int, int]) -> None:
    board = next(
        iter(BoardStream(texture="warm_wood", seed=0, defect_rate=1.0, num_parts=1, image_size=1024))
    ).image_bgr
    noise = np.random.default_rng(0).normal(0, 4, (size[1], size[0], 3))
    frame = np.clip(cv2.resize(board, size, interpolation=cv2.INTER_AREA) + noise, 0, 255).astype(np.uint8)
    by_area = Preprocessing().apply(frame).astype(int)
    difference = Preprocessing(resize="halving").apply(frame) - by_area
    assert np.abs(difference).mean() < 0.6
    assert np.abs(difference).max() <= 8
    assert abs(difference.mean()) < 0.5


@pytest.mark.parametrize("size", [(4096, 500), (2001, 1001)])
def test_what_halving_does_not_suit_is_resized_by_area(size: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    np.testing.assert_array_equal(Preprocessing(resize="halving").apply(frame), Preprocessing().apply(frame))


def test_versions_without_the_choice_of_resizing_read_what_does_not_make_it() -> None:
    assert b"resize" not in msgspec.json.encode(Preprocessing())
    chosen = Preprocessing(resize="halving")
    assert msgspec.json.decode(msgspec.json.encode(chosen), type=Preprocessing) == chosen


def test_preprocessing_keeps_masks_binary_and_aligned() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 32:48] = 255
    out = Preprocessing(height=32, width=32).apply_to_mask(mask)
    expected = np.zeros((32, 32), np.uint8)
    expected[8:16, 16:24] = 255
    assert np.array_equal(out, expected)


def test_a_region_outside_the_frame_is_refused(photo: np.ndarray) -> None:
    with pytest.raises(DataError, match="reaches outside the 64x48 image"):
        Preprocessing(roi=Region(x=40, y=0, width=32, height=32)).apply(photo)


@pytest.mark.parametrize("frame", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_frames_of_the_wrong_kind_are_refused(frame: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected a uint8 BGR frame"):
        Preprocessing().apply(frame)


@pytest.mark.parametrize("side", [0, 31, 100, 8192])
def test_impossible_input_sides_are_refused(side: int) -> None:
    with pytest.raises(ConfigError, match=r"input.height must be a multiple of 32 32..4096, not"):
        load_config(None, Learning, {"input": {"height": side}})


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "a,b,c,d", "0,0,0,5", "-1,0,5,5", "0,0,5,9999999", f"{'9' * 5000},0,1,1"]
)
def test_impossible_regions_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="region of interest"):
        Region.parse(text)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_samples_of_fewer_bits_are_scaled_by_theirs(photo: np.ndarray, bits: int, suffix: str, tmp_path: Path) -> None:
    deep = np.round(photo * (((1 << bits) - 1) / 255)).astype(np.uint16)
    (tmp_path / f"mono{suffix}").write_bytes(encode(deep, suffix))
    preprocessing = Preprocessing(height=32, width=32, bits=bits)
    samples = preprocessing.read(tmp_path / f"mono{suffix}")
    np.testing.assert_array_equal(preprocessing.picture(samples), photo)
    np.testing.assert_array_equal(preprocessing.apply(samples), Preprocessing(height=32, width=32).apply(photo))
    # Files of 8 bits are what they are.
    np.testing.assert_array_equal(preprocessing.picture(photo), photo)


def test_samples_of_more_bits_than_they_should_have_are_refused_not_cut_off(photo: np.ndarray) -> None:
    deep = photo.astype(np.uint16) << 8
    with pytest.raises(DataError, match=r"samples reach \d+, more than input\.bits = 12 can hold \(0\.\.4095\)"):
        Preprocessing(bits=12).apply(deep)


def test_sixteen_bits_are_scaled_as_ever() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(to_8_bit(every), np.round(every / 257).astype(np.uint8))


def test_versions_without_bits_read_what_does_not_set_them() -> None:
    assert b"bits" not in msgspec.json.encode(Preprocessing())
    assert b"megapixels" not in msgspec.json.encode(Preprocessing())
    chosen = Preprocessing(bits=12, max_megapixels=151.5)
    assert msgspec.json.decode(msgspec.json.encode(chosen), type=Preprocessing) == chosen
    assert chosen.max_pixels == 151_500_000


@pytest.mark.parametrize("bits", [7, 17])
def test_impossible_bits_are_refused(bits: int) -> None:
    with pytest.raises(msgspec.ValidationError, match="bits"):
        msgspec.convert({"bits": bits}, Preprocessing)
