"""Signed packages: whose they are, and that nothing was changed since."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli import cli
from edgeflame.errors import MissingDependencyError, NegativeAnswerError, PackageError, StorageError, UsageError
from edgeflame.package import (
    MANIFEST_MEMBER,
    MODEL_MEMBER,
    SIGNATURE_MEMBER,
    STATISTICS_MEMBER,
    Package,
    read_package,
    write_package,
)
from edgeflame.signing import PRIVATE_KEY, PUBLIC_KEY, sign_package, verify_release, verify_signature, write_keys
from tests.support.small_package import random_gaussian, small_manifest, with_references, write_images

STATS = random_gaussian(grid=(2, 3), channels=5, rank=2)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    write_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "m.edgeflame"
    write_package(target, manifest=small_manifest(STATS, threshold=2.5), model_onnx=b"graph" * 50, statistics=STATS)
    return target


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def rewrite(path: Path, **changes: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, change in changes.items():
        full = {
            "manifest": MANIFEST_MEMBER,
            "model": MODEL_MEMBER,
            "statistics": STATISTICS_MEMBER,
            "signature": SIGNATURE_MEMBER,
        }[name]
        members[full] = change(members[full])
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_signing_changes_nothing_but_adds_a_member(path: Path, keys: Path) -> None:
    before = read_package(path)
    identity = sign_package(path, keys / PRIVATE_KEY)
    after = read_package(path)
    assert verify_signature(after, keys / PUBLIC_KEY) == identity
    assert (after.manifest, after.model_onnx) == (before.manifest, before.model_onnx)
    # Ed25519 is deterministic: the same key gives the same file.
    signed = path.read_bytes()
    sign_package(path, keys / PRIVATE_KEY)
    assert path.read_bytes() == signed


def test_an_unsigned_package(path: Path, keys: Path) -> None:
    with pytest.raises(PackageError, match="the package is not signed"):
        verify_signature(read_package(path), keys / PUBLIC_KEY)


def test_another_key(path: Path, keys: Path, tmp_path: Path) -> None:
    other = write_keys(tmp_path / "other")
    sign_package(path, tmp_path / "other" / PRIVATE_KEY)
    with pytest.raises(PackageError, match=f"signed with key '{other}', not with"):
        verify_signature(read_package(path), keys / PUBLIC_KEY)


def test_another_key_under_a_forged_name(path: Path, keys: Path, tmp_path: Path) -> None:
    identity = sign_package(path, keys / PRIVATE_KEY)
    write_keys(tmp_path / "other")
    sign_package(path, tmp_path / "other" / PRIVATE_KEY)
    rewrite(path, signature=lambda data: json.dumps({**json.loads(data), "key_id": identity}).encode())
    with pytest.raises(PackageError, match="altered after key"):
        verify_signature(read_package(path), keys / PUBLIC_KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"manifest": lambda data: data.replace(b"2.5", b"9.5")},
        {"manifest": lambda data: data + b" "},
        {"signature": lambda data: json.dumps({**json.loads(data), "signature": "AAAA"}).encode()},
        {"signature": lambda data: json.dumps({**json.loads(data), "signature": "no base64!"}).encode()},
        {"signature": lambda data: b"{}"},
        {"signature": lambda data: b"\xff\xfe"},
        {"signature": lambda data: b"x" * 100_000},
        {"signature": lambda data: json.dumps({**json.loads(data), "algorithm": "none"}).encode()},
    ],
)
def test_whatever_is_altered(path: Path, keys: Path, changes: dict[str, Any]) -> None:
    sign_package(path, keys / PRIVATE_KEY)
    rewrite(path, **changes)
    with pytest.raises(PackageError) as raised:
        verify_signature(read_package(path), keys / PUBLIC_KEY)
    assert "\n" not in str(raised.value)


def test_a_member_with_its_hash_made_to_fit(path: Path, keys: Path) -> None:
    """Altering a member and the hash in the manifest breaks the signature instead."""
    sign_package(path, keys / PRIVATE_KEY)
    old, new = (hashlib.sha256(data).hexdigest().encode() for data in (b"graph" * 50, b"other"))
    rewrite(path, model=lambda data: b"other", manifest=lambda data: data.replace(old, new))
    package = read_package(path)
    assert package.model_onnx == b"other"
    with pytest.raises(PackageError, match="altered after key"):
        verify_signature(package, keys / PUBLIC_KEY)


def test_a_release_is_numbered_and_the_number_signed(path: Path, keys: Path, tmp_path: Path) -> None:
    sign_package(path, keys / PRIVATE_KEY, release=7)
    assert verify_release(read_package(path), keys / PUBLIC_KEY) == 7
    sign_package(path, keys / PRIVATE_KEY)
    assert verify_release(read_package(path), keys / PUBLIC_KEY) == 7, "signed again it is the same release"
    rewrite(path, signature=lambda data: json.dumps({**json.loads(data), "release": 8}).encode())
    with pytest.raises(PackageError, match="release number 8 was altered"):
        verify_release(read_package(path), keys / PUBLIC_KEY)
    sign_package(path, keys / PRIVATE_KEY)
    assert verify_release(read_package(path), keys / PUBLIC_KEY) > 1_700_000_000, "a number that nobody gave is none"
    write_keys(tmp_path / "other")
    with pytest.raises(PackageError, match="altered"):
        verify_release(read_package(path), tmp_path / "other" / PUBLIC_KEY)


def test_a_signature_of_an_earlier_version_has_no_number_and_that_version_reads_ours(path: Path, keys: Path) -> None:
    sign_package(path, keys / PRIVATE_KEY, release=7)

    class Former(msgspec.Struct, frozen=True, kw_only=True):
        algorithm: str
        key_id: str
        signature: str

    document = read_package(path).signature_json
    assert document is not None
    former = msgspec.json.decode(document, type=Former)
    rewrite(path, signature=lambda _: msgspec.json.encode(former))
    package = read_package(path)
    assert verify_signature(package, keys / PUBLIC_KEY) == former.key_id
    assert verify_release(package, keys / PUBLIC_KEY) == 0


def test_a_zip_bomb_is_neither_unpacked_nor_signed(path: Path, keys: Path) -> None:
    data = bytes(1 << 24)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members[MANIFEST_MEMBER])
    manifest["sha256"]["padding"] = hashlib.sha256(data).hexdigest()
    members[MANIFEST_MEMBER] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("padding", data, zipfile.ZIP_DEFLATED)
    before = path.read_bytes()
    with pytest.raises(PackageError, match="padding is compressed"):
        sign_package(path, keys / PRIVATE_KEY)
    assert path.read_bytes() == before


def test_a_signature_is_verified_before_what_it_covers_is_read(path: Path, keys: Path) -> None:
    sign_package(path, keys / PRIVATE_KEY)
    rewrite(path, manifest=lambda data: data + b" ", model=lambda data: data + b"another")
    with pytest.raises(PackageError, match="altered after key"):
        read_package(path, accept=partial(verify_signature, public_key=keys / PUBLIC_KEY))


def test_keys_are_secret_and_never_overwritten(keys: Path) -> None:
    assert stat.S_IMODE((keys / PRIVATE_KEY).stat().st_mode) == 0o600
    before = (keys / PRIVATE_KEY).read_bytes()
    with pytest.raises(StorageError, match="not overwritten"):
        write_keys(keys)
    assert (keys / PRIVATE_KEY).read_bytes() == before


@pytest.mark.parametrize(
    "content", [None, b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"]
)
def test_what_is_no_key(path: Path, keys: Path, content: bytes | None) -> None:
    wrong = keys / "wrong.pem"
    if content is not None:
        wrong.write_bytes(content)
    with pytest.raises(UsageError, match=r"wrong\.pem: "):
        sign_package(path, wrong)
    with pytest.raises(UsageError, match=r"wrong\.pem: "):
        verify_signature(read_package(path), wrong)
    with pytest.raises(UsageError, match="not a public key"):
        verify_signature(read_package(path), keys / PRIVATE_KEY)


def test_keys_of_another_kind(path: Path, keys: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    other = keys / "x25519.pem"
    other.write_bytes(
        X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with pytest.raises(UsageError, match="not an Ed25519 key"):
        sign_package(path, other)


def test_without_cryptography_the_error_says_what_to_install(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingDependencyError, match=r"edgeflame\[sign\]"):
        write_keys(tmp_path / "k")


def test_the_commands(package: Package, tmp_path: Path) -> None:
    model, keys = with_references(package, tmp_path / "m.edgeflame"), tmp_path / "keys"
    identity = run("model", "keygen", "--out", keys).stdout.split()[1]
    source = write_images(tmp_path / "photos")
    guarded = ("inspect", "--model", model, "--source", source, "--json", "--public-key", keys / PUBLIC_KEY)
    with pytest.raises(PackageError, match="not signed"):
        run(*guarded)
    assert "signature: none" in run("model", "verify", model).stdout
    assert identity in run("model", "sign", model, "--key", keys / PRIVATE_KEY).stdout
    verified = run("model", "verify", model, "--public-key", keys / PUBLIC_KEY)
    assert f"signature: good, key {identity}" in verified.stdout
    assert "parity: 3 reference images on CPUExecutionProvider in fp32" in verified.stdout
    assert "not verified" in run("model", "verify", model).stdout
    assert run(*guarded).exit_code == 0
    document = json.loads(run("model", "verify", model, "--public-key", keys / PUBLIC_KEY, "--json").stdout)
    assert document["verified_key"] == identity
    assert document["parity"]["num_images"] == 3

    shutil.copy(model, tmp_path / "z.edgeflame")
    (tmp_path / "broken.edgeflame").write_bytes(b"?")
    listed = run("model", "list", tmp_path).stdout
    assert identity in listed
    assert "broken.edgeflame: not a model package" in " ".join(listed.split())
    rows = json.loads(run("model", "list", tmp_path, "--json").stdout)["packages"]
    assert [row["file"] for row in rows] == ["broken.edgeflame", "m.edgeflame", "z.edgeflame"]
    assert rows[1]["signed_by"] == identity


def test_verify_of_another_graph_is_a_no(package: Package, tmp_path: Path) -> None:
    import onnx
    import onnx.numpy_helper

    model = with_references(package, tmp_path / "m.edgeflame")
    graph = onnx.load_from_string(package.model_onnx)
    mean = next(entry for entry in graph.graph.initializer if entry.name == "edgeflame.mean")
    mean.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(mean) * 1.1, mean.name))
    (tmp_path / "other.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(NegativeAnswerError, match="does not score"):
        run("model", "verify", model, "--onnx", tmp_path / "other.onnx")
    run("export", "--model", model, "--onnx", tmp_path / "same.onnx")
    assert "in fp32 differ by" in run("model", "verify", model, "--onnx", tmp_path / "same.onnx").stdout
    with pytest.raises(UsageError, match="cannot be read"):
        run("model", "verify", model, "--onnx", tmp_path / "none.onnx")


def test_a_package_without_references_is_verified_without(package_file: Path) -> None:
    assert "parity: not checked" in run("model", "verify", package_file).stdout
