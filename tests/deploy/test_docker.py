"""Dockerfiles and the compose file: linted, held to our rules, and the scripts inside run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgeflame.metrics import Metric, MetricsServer
from requirements.deploy_locks import wanted
from tests.support.image_registry import REGISTRY, image_registry, push
from tests.support.paths import REPOSITORY
from tests.test_architecture import PACKAGES

DOCKER = REPOSITORY / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = DOCKER / "compose.yml"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_dockerfiles_are_clean() -> None:
    assert len(DOCKERFILES) == 6
    done = subprocess.run([HADOLINT, *DOCKERFILES], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_not_roots_and_stops_on_signals(path: Path) -> None:
    text = path.read_text()
    bases = re.findall(r"^(?:ARG BASE=|FROM )([^$\s]+)", text, re.MULTILINE)
    assert bases
    assert all(re.search(r":[\w.-]*\d", base) for base in bases), bases
    last = text[text.rindex("\nFROM ") :]
    user = re.search(r"^USER (\d+)$", last, re.MULTILINE)
    assert user is not None
    assert int(user[1]) > 1000
    # Exec form: the program itself is process 1 and gets SIGTERM.
    assert re.search(r'^ENTRYPOINT \["', last, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK (.|\\\n)*CMD \["', last, re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_installs_is_held_by_hashes(path: Path) -> None:
    text = path.read_text()
    if "ARG EXTRAS=" not in text:
        assert "pip" not in text
        return
    lock = re.search(r"^ARG LOCK=(\S+)$", text, re.MULTILINE)
    assert lock is not None
    (asked, *_) = wanted()[lock[1]]
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(re.findall(r"[\w-]+", asked)) == set(extras.split(","))
    assert "-m pip" not in text
    assert 'install.sh /opt/edgeflame/venv "${LOCK}" ".[${EXTRAS}]"' in text


@pytest.mark.wheel
@pytest.mark.timeout(900)
def test_an_image_takes_what_the_lock_says_and_refuses_other_files(tmp_path: Path) -> None:
    for name in (*PACKAGES, "deploy"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, env=environment)

    def install() -> subprocess.CompletedProcess[str]:
        command = ["deploy/docker/install.sh", "venv", "aggregator.txt", ".[fleet,memory,metrics,zstd]"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    lock = tmp_path / "deploy" / "locks" / "aggregator.txt"
    right = lock.read_text()
    lock.write_text(
        re.sub(r"(?m)^(click==\S+ ; .*\\\n)(    --hash=.*\n)+", rf"\1    --hash=sha256:{'0' * 64}\n", right)
    )
    done = install()
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not list((tmp_path / "venv").rglob("click"))
    lock.write_text(right)
    done = install()
    assert done.returncode == 0, done.stderr
    versions = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-m", "pip", "freeze", "--exclude", "edgeflame"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert len(versions.stdout.splitlines()) > 10
    assert all(f"{line.lower().replace('_', '-')} ;" in right for line in versions.stdout.splitlines())


@pytest.mark.skipif(REGISTRY is None or not shutil.which("skopeo"), reason="docker-registry or skopeo is not installed")
def test_base_images_are_pinned_by_the_digests_that_their_registry_has(tmp_path: Path) -> None:
    folder = tmp_path / "docker"
    shutil.copytree(DOCKER, folder, ignore=shutil.ignore_patterns("data"))
    files = [*folder.glob("*.Dockerfile"), folder / "compose.yml"]
    with image_registry(tmp_path) as address:
        for path in files:
            named = r"(?m)^((?:ARG BASE=| *image: | *BASE: )(?!edgeflame-))(?:nvcr\.io/)?([^@\s]+).*$"
            path.write_text(re.sub(named, rf"\1{address}/\2", path.read_text()))
        before = {path.name: path.read_text() for path in files}
        images = {found for text in before.values() for found in re.findall(rf"{address}/(\S+)", text)}
        assert len(images) == 6
        first, *others = sorted(images)
        digests = {image: push(address, image) for image in others}

        # One that is not there: nothing is pinned by halves.
        done = subprocess.run([folder / "pin.sh"], capture_output=True, text=True)
        assert done.returncode == 1
        assert f"no digest of {address}/{first}; nothing was changed" in done.stderr
        assert {path.name: path.read_text() for path in files} == before

        digests[first] = push(address, first)
        for _ in range(2):
            done = subprocess.run([folder / "pin.sh"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            for path in files:
                expected = before[path.name]
                for image, digest in digests.items():
                    expected = re.sub(rf"(?m){re.escape(image)}$", f"{image}@{digest}", expected)
                assert path.read_text() == expected
    assert HADOLINT is None or subprocess.run([HADOLINT, *files[:-1]]).returncode == 0


def test_what_is_copied_is_let_in_and_nothing_else() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for path in DOCKERFILES
        for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == let_in
    for path in DOCKERFILES:
        folders = set(re.findall(r"^COPY (\w+) \w+$", path.read_text(), re.MULTILINE))
        assert folders in (set(), set(PACKAGES)), path.name
    assert all((REPOSITORY / name).exists() for name in copied)


def test_compose_waits_for_health_and_hardens_everything() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert "privileged" not in service
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] in ("service_healthy", "service_completed_successfully"), (name, other)
        if "build" in service:
            assert (DOCKER / "../.." / service["build"]["dockerfile"]).is_file()
        else:
            assert service["healthcheck"]["test"], name
            assert re.search(r":v?\d", service["image"]), name
    files = [volume.split(":")[0] for service in services().values() for volume in service["volumes"]]
    assert all((DOCKER / name).exists() for name in files if name.startswith(".") and not name.startswith("./data"))


def test_compose_is_read_by_docker_compose() -> None:
    programs = (["docker", "compose"], ["docker-compose"])
    for program in programs:
        if shutil.which(program[0]) and subprocess.run([*program, "version"], capture_output=True).returncode == 0:
            done = subprocess.run([*program, "-f", str(COMPOSE), "config", "-q"], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
            return
    pytest.skip("Docker Compose is not installed")


def test_what_the_containers_mount_is_right(tmp_path: Path) -> None:
    from aggregator.config import AggregateConfig
    from edge.config import InspectConfig
    from edgeflame.config import load_config

    assert load_config(DOCKER / "aggregator.toml", AggregateConfig).expected_sites == ("plant-a", "plant-b")
    line = load_config(DOCKER / "line.toml", InspectConfig)
    assert line.web is not None
    assert line.web.listen == "0.0.0.0:8080"
    if promtool := shutil.which("promtool"):
        shutil.copy(DOCKER / "prometheus.yml", tmp_path)
        shutil.copy(DOCKER.parent / "prometheus" / "edgeflame.rules.yml", tmp_path)
        done = subprocess.run([promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True)
        assert done.returncode == 0, done.stdout


def test_the_health_check_is_true() -> None:
    command = [sys.executable, "-I", str(DOCKER / "healthcheck.py")]
    with MetricsServer("127.0.0.1:0") as server:
        server.show([Metric(name="edgeflame_test", meaning="A test.")])
        url = server.url
        assert subprocess.run([*command, url]).returncode == 0
    done = subprocess.run([*command, url], capture_output=True, text=True)
    assert done.returncode == 1
    assert url in done.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to the containers' users")
def test_what_compose_mounts_is_made_once_and_is_secret(tmp_path: Path) -> None:
    shutil.copytree(DOCKER, tmp_path / "docker", ignore=shutil.ignore_patterns("data"))
    command = [tmp_path / "docker" / "prepare.sh", "--parts", "1", "--photos", "1", "--size", "64"]
    known = {**os.environ, "PYTHONPATH": str(REPOSITORY), "EDGEFLAME": f"{sys.executable} -m edgeflame"}
    data = tmp_path / "docker" / "data"
    for _ in range(2):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=known)
        assert done.returncode == 0, done.stderr
    secrets = {path.name: path.stat() for path in (data / "secrets").iterdir()}
    declared = yaml.safe_load(COMPOSE.read_text())["secrets"]
    assert set(secrets) == set(declared)
    assert all(status.st_mode & 0o077 == 0 for status in secrets.values())
    assert secrets["line-1.kit"].st_uid == 10001
    mounted = [volume.split(":")[0] for service in services().values() for volume in service["volumes"]]
    assert all((tmp_path / "docker" / name).is_dir() for name in mounted if name.startswith("./data"))
