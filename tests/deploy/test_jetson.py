"""The Jetson's installer: which JetPack it sees in recorded texts, and what it would do. Its steps need a Jetson."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

JETSON = REPOSITORY / "deploy" / "jetson"

_TEXT = (
    "# R{} (release), REVISION: {}, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
)
ORIN = _TEXT.format(36, "4.3") + "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
THOR = _TEXT.format(38, "2.0") + "# KERNEL_VARIANT: oot\n"
NANO = _TEXT.format(32, "7.1")


def install(release: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "EDGEFLAME_TEGRA_RELEASE": str(release)}
    return subprocess.run(
        [str(JETSON / "install.sh"), *arguments], capture_output=True, text=True, env=known, timeout=60
    )


@pytest.mark.parametrize(
    ("text", "l4t", "jetpack", "cuda"),
    [(ORIN, "36.4.3", "6", "cuda-bindings>=12.6,<13"), (THOR, "38.2.0", "7", "cuda-bindings>=13,<14")],
)
def test_jetpack_is_known_by_its_release(text: str, l4t: str, jetpack: str, cuda: str, tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    release.write_text(text)
    model = tmp_path / "board.edgeflame"
    model.touch()
    done = install(release, "--dry-run", "--model", str(model), "--root", str(tmp_path / "root"))
    assert done.returncode == 0, done.stderr
    assert f"L4T {l4t}, JetPack {jetpack}" in done.stdout
    assert "would run: python3 -m venv --system-site-packages" in done.stdout
    assert f"edgeflame[cpu,web,plc,video,sign] {cuda} onnx>=1.16" in done.stdout
    assert f"export --model {model} --trt --precision fp16 --out {tmp_path}" in done.stdout
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("text", "what"), [(NANO, "L4T 32.7.1 is neither"), ("# what?\n", "does not say which release")]
)
def test_what_is_not_supported_is_said(text: str, what: str, tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    release.write_text(text)
    done = install(release, "--dry-run")
    assert done.returncode == 1
    assert what in done.stderr


def test_another_machine_is_sent_to_the_other_installer(tmp_path: Path) -> None:
    done = install(tmp_path / "gone")
    assert done.returncode == 1
    assert "this is no Jetson; take deploy/install.sh" in done.stderr
