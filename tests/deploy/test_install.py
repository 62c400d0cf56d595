"""install.sh and wheelhouse.sh as an administrator runs them, into a folder that stands for a machine's root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.support.systemd_units import SERVICES

DEPLOY = REPOSITORY / "deploy"
INSTALL = DEPLOY / "install.sh"
SHELLCHECK = shutil.which("shellcheck")


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=400
    )


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean() -> None:
    folders = (DEPLOY, REPOSITORY / "benchmarks")
    scripts = sorted(path.relative_to(REPOSITORY) for folder in folders for path in folder.rglob("*.sh"))
    assert len(scripts) >= 5
    done = run(SHELLCHECK, "--external-sources", *scripts, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["kitchen"], "expected a role: aggregator, site or line; got 'kitchen'"),
        ([], "no role given"),
        (["--bogus"], "unknown option --bogus"),
        (["--wheelhouse"], "--wheelhouse needs a value"),
        (["--purge", "line"], "--purge belongs to --uninstall"),
        (["--uninstall", "line"], "--uninstall takes no role"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], what: str, tmp_path: Path) -> None:
    done = run(INSTALL, "--root", tmp_path, *arguments)
    assert done.returncode == 2
    assert what in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_everything_and_does_nothing(tmp_path: Path) -> None:
    done = run(INSTALL, "--root", tmp_path, "--dry-run", "line", "site")
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])
    locks = f"--require-hashes -r {DEPLOY}/locks/line.txt --require-hashes -r {DEPLOY}/locks/site.txt"
    extras = "edgeflame[cpu,web,plc,video,sign,cpu,train"
    assert f"pip install --disable-pip-version-check --no-input {locks} {extras}" in done.stdout
    unlocked = run(INSTALL, "--root", tmp_path, "--dry-run", "--unlocked", "line").stdout
    assert "pip install --disable-pip-version-check --no-input edgeflame[cpu,web,plc,video,sign]" in unlocked
    assert all(f"{tmp_path}/usr/local/lib/systemd/system/{name}" in done.stdout for name in SERVICES)
    assert "gpu" in run(INSTALL, "--root", tmp_path, "--dry-run", "--gpu", "line").stdout


def test_what_cannot_be_installed_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "SHA256SUMS").write_text(f"{'0' * 64}  gone.whl\n")
    done = run(
        INSTALL, "--root", tmp_path / "root", "--python", sys.executable, "--wheelhouse", tmp_path / "wheels", "line"
    )
    assert done.returncode == 1
    assert "is damaged: carry it over again" in done.stderr
    (tmp_path / "wheels" / "SHA256SUMS").unlink()
    done = run(
        INSTALL, "--root", tmp_path / "root", "--python", sys.executable, "--wheelhouse", tmp_path / "wheels", "line"
    )
    assert done.returncode == 1
    assert "the release that was current still is" in done.stderr
    assert list((tmp_path / "root" / "opt" / "edgeflame" / "releases").iterdir()) == []
    assert run(INSTALL, "--root", tmp_path / "root", "--rollback").returncode == 1


@pytest.mark.wheel
@pytest.mark.timeout(900)
def test_from_a_wheelhouse_to_a_line_and_back(tmp_path: Path, package_file: Path) -> None:
    wheels, root = tmp_path / "wheels", tmp_path / "root"
    done = run(DEPLOY / "wheelhouse.sh", "--python", sys.executable, "--out", wheels, "line")
    assert done.returncode == 0, done.stderr
    install = [INSTALL, "--root", root, "--python", sys.executable, "--wheelhouse", wheels]
    first = run(*install, "line")
    assert first.returncode == 0, first.stderr
    opt, etc, state = (root / place for place in ("opt/edgeflame", "etc/edgeflame", "var/lib/edgeflame"))
    release = (opt / "current").resolve()
    # The program is the installed one, wherever it is called from: here stand folders of the same names.
    done = run(opt / "edgeflame", "doctor", "--model", package_file, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout
    assert "test piece" in done.stdout
    assert str(release) in run(release / "bin" / "python", "-I", "-c", "import edge; print(edge.__file__)").stdout
    assert (root / "usr/local/bin/edgeflame").readlink() == Path("/opt/edgeflame/edgeflame")

    again = run(*install)  # the role is remembered
    assert "is installed already, with the same packages" in again.stdout
    assert (opt / "current").resolve() == release
    assert len(list((opt / "releases").iterdir())) == 1

    (opt / "releases" / "20260101T000000Z").mkdir()
    assert "release 20260101T000000Z is current again" in run(INSTALL, "--root", root, "--rollback").stdout
    assert (opt / "current").resolve().name == "20260101T000000Z"
    assert "there is no release before" in run(INSTALL, "--root", root, "--rollback").stderr

    state.mkdir(parents=True)
    kept = etc / "lines" / "line-1.toml"
    kept.write_text("[web]\n")
    assert run(INSTALL, "--root", root, "--uninstall").returncode == 0
    assert (opt.exists(), kept.exists(), state.exists()) == (False, True, True)
    assert list((root / "usr/local/lib/systemd/system").iterdir()) == []
    assert run(INSTALL, "--root", root, "--uninstall", "--purge").returncode == 0
    assert (etc.exists(), state.exists()) == (False, False)

    assert "has no site.txt: make the wheelhouse for the role site as well" in run(*install, "site").stderr
    # Somebody who changes a wheel can write its sum anew; the lock does not know it.
    (wheel,) = wheels.glob("click-*.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("click/more.py", "")
    sums = subprocess.run("sha256sum -- *.whl locks/*.txt > SHA256SUMS", shell=True, cwd=wheels)
    assert sums.returncode == 0
    done = run(*install, "line")
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "the release that was current still is" in done.stderr
    assert not (opt / "current").exists()
    # A wheelhouse without locks, as earlier releases made it.
    shutil.rmtree(wheels / "locks")
    subprocess.run("sha256sum -- *.whl > SHA256SUMS", shell=True, cwd=wheels, check=True)
    done = run(*install, "line")
    assert done.returncode == 0, done.stderr
