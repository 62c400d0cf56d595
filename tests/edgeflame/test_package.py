"""The model package: written whole, read back the same, and everything foreign, cut or altered refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from edgeflame.drift_reference import DriftReference, make_stream_reference
from edgeflame.errors import DataError, NumericalError, PackageError, StorageError
from edgeflame.fitted_images import image_digest
from edgeflame.package import (
    DRIFT_REFERENCE_MEMBER,
    FITTED_MEMBER,
    MANIFEST_MEMBER,
    MAX_MANIFEST_BYTES,
    MODEL_MEMBER,
    STATISTICS_MEMBER,
    PackageHead,
    read_package,
    write_package,
)
from edgeflame.statistics.codec import decode_statistics, encode_statistics
from tests.support.small_package import random_gaussian, small_manifest

STATS = random_gaussian(grid=(2, 3), channels=5, rank=2)
GRAPH = b"no real graph: reading a package does not look into it" * 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "m.edgeflame"
    write_package(target, manifest=small_manifest(STATS, threshold=2.5), model_onnx=GRAPH, statistics=STATS)
    return target


def refused(path: Path, *patterns: str) -> None:
    """Refused in one line that names the file."""
    with pytest.raises(PackageError) as raised:
        read_package(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for pattern in patterns:
        assert re.search(pattern, message), message


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Repack with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def edit_manifest(path: Path, **fields: Any) -> None:
    def change(members: dict[str, bytes]) -> None:
        members[MANIFEST_MEMBER] = json.dumps({**json.loads(members[MANIFEST_MEMBER]), **fields}).encode()

    rewrite(path, change)


def test_it_reads_back_what_was_written(path: Path) -> None:
    package = read_package(path)
    assert package.model_onnx == GRAPH
    assert package.manifest.threshold.value == 2.5
    assert package.manifest.product == "test piece"
    assert package.manifest.grid == (2, 3)
    for name in ("mean", "basis", "eigenvalues", "residual"):
        np.testing.assert_array_equal(getattr(package.statistics, name), getattr(STATS, name))
    assert (package.statistics.ridge, package.statistics.count) == (STATS.ridge, STATS.count)


def test_what_drift_is_measured_against_travels_with_the_model(path: Path, tmp_path: Path) -> None:
    assert read_package(path).condition is None
    condition = DriftReference(streams={"score": make_stream_reference(np.arange(50.0))})
    other = tmp_path / "other.edgeflame"
    write_package(
        other,
        manifest=small_manifest(STATS, threshold=2.5),
        model_onnx=GRAPH,
        statistics=STATS,
        condition=condition,
    )
    assert read_package(other).condition == condition
    rewrite(other, lambda members: members.__delitem__(DRIFT_REFERENCE_MEMBER))
    refused(other, DRIFT_REFERENCE_MEMBER)


def test_digests_of_the_fitted_images_travel_with_the_model(path: Path, tmp_path: Path) -> None:
    assert read_package(path).fitted == frozenset()
    frames = [np.full((4, 6, 3), value, dtype=np.uint8) for value in (1, 2, 2)]
    digests = [image_digest(frame) for frame in frames]
    assert image_digest(frames[0].reshape(6, 4, 3)) != digests[0]
    manifest = small_manifest(STATS, threshold=2.5)
    other = tmp_path / "other.edgeflame"
    write_package(other, manifest=manifest, model_onnx=GRAPH, statistics=STATS, fitted=digests)
    assert read_package(other).fitted == set(digests)
    assert len(read_package(other).fitted) == 2

    def cut(members: dict[str, bytes]) -> None:
        members[FITTED_MEMBER] = members[FITTED_MEMBER][:-1]
        document = json.loads(members[MANIFEST_MEMBER])
        document["sha256"][FITTED_MEMBER] = hashlib.sha256(members[FITTED_MEMBER]).hexdigest()
        members[MANIFEST_MEMBER] = json.dumps(document).encode()

    rewrite(other, cut)
    refused(other, "not a list of fitted images")


def test_a_reference_that_makes_no_sense_is_refused(path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        members[DRIFT_REFERENCE_MEMBER] = b'{"streams": {"score": {"quantiles": [3, 2, 1], "count": 9}}}'
        document = json.loads(members[MANIFEST_MEMBER])
        document["sha256"][DRIFT_REFERENCE_MEMBER] = hashlib.sha256(members[DRIFT_REFERENCE_MEMBER]).hexdigest()
        members[MANIFEST_MEMBER] = json.dumps(document).encode()

    rewrite(path, change)
    refused(path, "quantiles")


def test_the_same_model_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.edgeflame"
    write_package(other, manifest=small_manifest(STATS, threshold=2.5), model_onnx=GRAPH, statistics=STATS)
    assert other.read_bytes() == path.read_bytes()


def test_cut_short_anywhere(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path)


def test_any_altered_byte_that_matters_is_noticed(path: Path) -> None:
    """A changed byte is refused, or lies where it changes nothing that is read (a zip's own dates, say)."""
    whole, expected = path.read_bytes(), read_package(path)
    unnoticed = 0
    for offset in range(0, len(whole), 7):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        try:
            package = read_package(path)
        except PackageError as exc:
            assert str(exc).startswith(str(path))  # noqa: PT017 - either outcome is right
            continue
        unnoticed += 1
        assert package.model_onnx == expected.model_onnx
        np.testing.assert_array_equal(package.statistics.basis, expected.statistics.basis)
        assert package.manifest == expected.manifest
    assert unnoticed < 0.1 * len(whole) / 7


@pytest.mark.parametrize("name", [MODEL_MEMBER, STATISTICS_MEMBER])
def test_an_altered_member(path: Path, name: str) -> None:
    def change(members: dict[str, bytes]) -> None:
        members[name] = members[name][:-1] + bytes([members[name][-1] ^ 1])

    rewrite(path, change)
    refused(path, f"{name} was altered or damaged")


@pytest.mark.parametrize("name", [MANIFEST_MEMBER, MODEL_MEMBER, STATISTICS_MEMBER])
def test_a_missing_member(path: Path, name: str) -> None:
    rewrite(path, lambda members: members.__delitem__(name))
    refused(path, name)


@pytest.mark.parametrize("name", [MANIFEST_MEMBER, MODEL_MEMBER, STATISTICS_MEMBER])
def test_a_compressed_member_is_not_unpacked(path: Path, name: str) -> None:
    """A few kilobytes could otherwise ask for gigabytes."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data, zipfile.ZIP_DEFLATED if member == name else zipfile.ZIP_STORED)
    refused(path, f"{name} is compressed")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("listed", [True, False])
def test_a_member_that_no_package_has_is_refused(path: Path, compression: int, listed: bool) -> None:
    data = bytes(1 << 20)

    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members[MANIFEST_MEMBER])
        if listed:
            manifest["sha256"]["extra.bin"] = hashlib.sha256(data).hexdigest()
        members[MANIFEST_MEMBER] = json.dumps(manifest).encode()

    rewrite(path, change)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.bin", data, compression)
    refused(path, r"extra\.bin")


def test_a_member_that_is_there_twice_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(MODEL_MEMBER, b"")
    refused(path, "twice")


def test_a_directory_of_very_many_members_is_not_read(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(20_000):
            archive.writestr(f"{index:040}", b"")
    refused(path, "directory is larger")


def test_members_are_bounded_by_what_the_manifest_says_of_them(path: Path) -> None:
    """A few positions and channels need no hundred kilobytes, whoever vouches for their hash."""

    def change(members: dict[str, bytes]) -> None:
        members[STATISTICS_MEMBER] += bytes(100_000)
        manifest = json.loads(members[MANIFEST_MEMBER])
        manifest["sha256"][STATISTICS_MEMBER] = hashlib.sha256(members[STATISTICS_MEMBER]).hexdigest()
        members[MANIFEST_MEMBER] = json.dumps(manifest).encode()

    rewrite(path, change)
    refused(path, r"statistics\.safetensors is too large")


def test_what_is_not_accepted_by_its_head_is_not_read(path: Path) -> None:
    """Other members are not even looked for before."""
    rewrite(path, lambda members: members.__delitem__(MODEL_MEMBER))

    def accept(head: PackageHead) -> None:
        assert head.manifest.product == "test piece"
        raise NumericalError("no")

    with pytest.raises(NumericalError, match="no"):
        read_package(path, accept=accept)


@pytest.mark.parametrize("claimed", [MAX_MANIFEST_BYTES + 1, 2**32 - 2])
def test_a_manifest_that_claims_to_be_huge(path: Path, claimed: int) -> None:
    data = path.read_bytes()
    entry = data.index(b"PK\x01\x02")  # the central directory's first entry, the manifest's
    size = struct.pack("<I", claimed)
    path.write_bytes(data[: entry + 20] + size + size + data[entry + 28 :])
    refused(path, "too large|cut short|claim")


def test_members_that_share_bytes_cannot_multiply_the_file(path: Path) -> None:
    """A second directory entry for the statistics' bytes, under another name of the same length."""
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    entries, at = [], start
    while at < end:
        name, extra, comment = struct.unpack("<HHH", data[at + 28 : at + 34])
        entries.append(data[at : at + 46 + name + extra + comment])
        at += len(entries[-1])
    (entry,) = (one for one in entries if one[46:].startswith(STATISTICS_MEMBER.encode()))
    twin = entry.replace(STATISTICS_MEMBER.encode(), STATISTICS_MEMBER.encode().upper())
    many = b"".join(entries) + twin * 9
    count = struct.pack("<HH", len(entries) + 9, len(entries) + 9)
    tail = data[end : end + 8] + count + struct.pack("<I", len(many)) + data[end + 16 :]
    path.write_bytes(data[:start] + many + tail)
    refused(path, "members claim|verlap")


@pytest.mark.parametrize(("name", "value"), [("eigenvalues", -0.5), ("residual", -1.0), ("residual", np.nan)])
def test_statistics_with_a_variance_that_cannot_be(path: Path, name: str, value: float) -> None:
    tensors = safetensors.numpy.load(encode_statistics(STATS))
    tensors[name].flat[0] = value
    header = encode_statistics(STATS)
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    damaged = safetensors.numpy.save(tensors, metadata=metadata)

    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members[MANIFEST_MEMBER])
        manifest["sha256"][STATISTICS_MEMBER] = hashlib.sha256(damaged).hexdigest()
        members[MANIFEST_MEMBER] = json.dumps(manifest).encode()
        members[STATISTICS_MEMBER] = damaged

    rewrite(path, change)
    refused(path, "statistics: (variances must not be negative|.* holds NaN)")


def test_a_manifest_that_is_huge(path: Path) -> None:
    edit_manifest(path, provenance={"x": "y" * MAX_MANIFEST_BYTES})
    refused(path, "too large")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, "not a model package of EdgeFlame"),
        ({"format_version": 2}, r"package format 2, this EdgeFlame \S+ reads 1"),
        ({"format_version": "1"}, "package format '1'"),
        ({"threshold": None}, "manifest.json is wrong"),
        ({"learning": {"method": "magic"}}, "unknown method 'magic'"),
        ({"sha256": {}}, "altered or damaged"),
        ({"grid": [3, 2]}, "not those the manifest describes"),
        ({"rank": 7}, "not those the manifest describes"),
    ],
)
def test_a_manifest_of_another_kind(path: Path, fields: dict[str, Any], message: str) -> None:
    edit_manifest(path, **fields)
    refused(path, message)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "0", "-3"])
def test_a_threshold_that_cannot_be(path: Path, value: str) -> None:
    """With NaN every comparison is false: such a package must never get to judge."""

    def change(members: dict[str, bytes]) -> None:
        members[MANIFEST_MEMBER] = re.sub(rb'("value":\s*)2\.5', rb"\g<1>" + value.encode(), members[MANIFEST_MEMBER])

    rewrite(path, change)
    refused(path, "manifest.json is")


@pytest.mark.parametrize("data", [b"{}", b"[]", b"no json", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest(path: Path, data: bytes) -> None:
    rewrite(path, lambda members: members.update({MANIFEST_MEMBER: data}))
    refused(path)


def test_files_that_are_no_packages(tmp_path: Path) -> None:
    path = tmp_path / "x.edgeflame"
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    for data in (b"", b"hello", b"PK\x05\x06" + bytes(18), other.getvalue()):
        path.write_bytes(data)
        refused(path, "not a model package")


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.edgeflame", "no such model package")
    refused(tmp_path, "cannot be read")


def test_an_old_package_survives_a_failed_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(StorageError, match="No space left"):
        write_package(path, manifest=small_manifest(STATS, threshold=1.0), model_onnx=b"new", statistics=STATS)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


class TestStatistics:
    """The safetensors member alone."""

    def test_cut_short_at_every_byte(self) -> None:
        data = encode_statistics(STATS)
        for length in range(len(data)):
            with pytest.raises(DataError):
                decode_statistics(data[:length])

    def test_values_that_would_take_more_memory_than_they_say_are_refused(self) -> None:
        data = encode_statistics(STATS)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors = {name: array.astype(np.uint8) for name, array in safetensors.numpy.load(data).items()}
        with pytest.raises(DataError, match="values of U8"):
            decode_statistics(safetensors.numpy.save(tensors, metadata=metadata))

    def test_arrays_that_are_views_keep_their_values(self) -> None:
        """Safetensors alone would write the memory behind the view."""
        wide = np.random.default_rng(0).uniform(1, 2, (6, 4)).astype(np.float32)
        sliced = dataclasses.replace(STATS, eigenvalues=wide[:, :2], mean=np.asfortranarray(STATS.mean))
        back = decode_statistics(encode_statistics(sliced))
        np.testing.assert_array_equal(back.eigenvalues, wide[:, :2])
        np.testing.assert_array_equal(back.mean, STATS.mean)

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        with pytest.raises(DataError):
            decode_statistics(data)

    def test_a_header_that_promises_more_than_there_is(self) -> None:
        header = json.dumps({"mean": {"dtype": "F32", "shape": [2**40, 5], "data_offsets": [0, 2**40 * 20]}}).encode()
        with pytest.raises(DataError):
            decode_statistics(len(header).to_bytes(8, "little") + header)


def with_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the package at ``path`` again with other words in its manifest."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members[MANIFEST_MEMBER])
    change(manifest)
    members[MANIFEST_MEMBER] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("product", ["", "  ", "x" * 201, "a\nb", "a\x1b[2J", "a\u202eb", "a\0"])
def test_a_product_that_is_no_name_is_refused(path: Path, product: str) -> None:
    with_manifest(path, lambda manifest: manifest.update(product=product))
    refused(path, "its manifest.json is wrong", "expected a name of 1 to 200 printable characters")


@pytest.mark.parametrize("key", ["num_images", "num_channels", "rank", "num_prototypes", "grid", "threshold"])
def test_counts_below_zero_are_refused(path: Path, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        match key:
            case "grid":
                manifest["grid"] = [-1, 3]
            case "threshold":
                manifest["threshold"]["num_images"] = -1
            case _:
                manifest[key] = -1

    with_manifest(path, change)
    refused(path, "its manifest.json is wrong", key)
