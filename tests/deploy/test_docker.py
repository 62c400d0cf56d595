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
