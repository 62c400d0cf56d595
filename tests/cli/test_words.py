"""What commands say where a person would stumble: names, suggestions, records, and two figures that seem to differ."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli import cli
from cli.fit import product_of
from cli.output import reconcile
from edgeflame.errors import UsageError
from edgeflame.mqtt.topics import is_name
from edgeflame.package import MAX_PRODUCT_CHARS, read_package, write_package
from edgeflame.signing import PRIVATE_KEY, sign_package, write_keys
from edgeflame.threshold import Threshold
from tests.support.paths import REPOSITORY
from tests.support.small_package import write_small_package


def edgeflame(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


@pytest.mark.parametrize(
    ("folder", "product"),
    [
        ("tile", "tile"),
        ("tile/train/good", "tile"),
        ("tile/train", "tile"),
        ("Teil 7 (oben)", "Teil-7-oben"),
        ("..hidden", "hidden"),
        ("部品", "product"),
        ("x" * 200, "x" * 64),
    ],
)
def test_a_product_is_called_after_its_folder(folder: str, product: str, tmp_path: Path) -> None:
    found = product_of(tmp_path / folder)
    assert found == product
    assert is_name(found)


def test_a_product_is_renamed_and_nothing_else_changes(tmp_path: Path) -> None:
    path = write_small_package(tmp_path / "m.edgeflame")
    before = read_package(path)
    done = edgeflame("model", "rename", path, "lid")
    assert (done.exit_code, done.stdout) == (0, f"{path}: lid, before {before.manifest.product}\n")
    after = read_package(path)
    assert after.manifest == msgspec.structs.replace(before.manifest, product="lid")
    assert (after.model_onnx, after.references) == (before.model_onnx, before.references)
    write_keys(tmp_path / "keys")
    sign_package(path, tmp_path / "keys" / PRIVATE_KEY)
    done = edgeflame("model", "rename", path, "base")
    assert "not signed any more" in done.stderr
    assert read_package(path).signature_json is None
    for wrong in ("", "a\nb", "x" * (MAX_PRODUCT_CHARS + 1)):
        assert isinstance(edgeflame("model", "rename", path, wrong).exception, UsageError)
    assert read_package(path).manifest.product == "base"


def test_a_package_is_shown_in_words(tmp_path: Path) -> None:
    path = write_small_package(tmp_path / "m.edgeflame")
    package = read_package(path)
    record = {
        "kind": "fit",
        "unreadable": [],
        "training": None,
        "statistics": {"rank": 6, "likelihoods": [{"rank": 6, "value": -1.23456789}], "left_out": ["a.png", "b.png"]},
        "seconds": {"embed": 1.25},
    }
    manifest = msgspec.structs.replace(package.manifest, provenance=record)
    write_package(path, manifest=manifest, model_onnx=package.model_onnx, statistics=package.statistics)
    said = " ".join(edgeflame("model", "show", path).stdout.split())
    assert "statistics rank 6, likelihoods ((rank 6, value -1.235)), left out (a.png, b.png)" in said
    assert "seconds embed 1.25" in said
    assert not set('{}"') & set(said)


@pytest.mark.parametrize(("typed", "meant"), [("inspekt", "inspect"), ("evalute", "evaluate"), ("modle", "model")])
def test_a_mistyped_command_gets_a_suggestion(typed: str, meant: str) -> None:
    done = edgeflame(typed, "--help")
    assert done.exit_code == 2
    assert f"No such command '{typed}'. Did you mean '{meant}'?" in done.stderr
    assert "Did you mean" not in edgeflame("zzzzz").stderr


def threshold(rate: float, **changes: object) -> Threshold:
    made = Threshold(
        value=1.0,
        false_reject_rate=rate,
        confidence=0.95,
        num_groups=59,
        num_images=59,
        groups_known=True,
        requested_false_reject_rate=rate,
        unit="photograph",
    )
    return msgspec.structs.replace(made, **changes)


def test_the_promise_and_the_test_are_reconciled() -> None:
    both = reconcile(threshold(0.05), (0.01, 0.18))
    assert both is not None
    assert "1% to 18% of new good photographs rejected, the promise at most 5.00%: both hold" in both
    assert "59 parts" in both
    more = reconcile(threshold(0.05), (0.08, 0.18))
    assert more is not None
    assert "more than the promise (at most 5.00%): its good parts differ" in more
    within = reconcile(threshold(0.05), (0.0, 0.04))
    assert within is not None
    assert "within the promise" in within
    parts = reconcile(threshold(0.05, unit="part"), (0.08, 0.18))
    assert parts is not None
    assert "counts parts" in parts
    assert reconcile(threshold(0.05), None) is None


def test_the_documentation_needs_nothing_of_edgeflame(tmp_path: Path) -> None:
    plan = subprocess.run(
        ["make", "-n", "docs", f"VENV={tmp_path / 'venv'}"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    installs = [line for line in plan.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 1
    assert "mkdocs-material" in installs[0]
    assert "-e" not in installs[0].split()
