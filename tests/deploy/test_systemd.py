"""The units: clean to systemd, as closed as the documentation says, and their command lines work as they stand."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import cli
from edgeflame.errors import EXIT_INTERRUPTED, ConfigError, MissingDependencyError, UsageError
from fleet.folder import make_fleet, open_fleet
from tests.support.brokers import BrokerProcess
from tests.support.paths import REPOSITORY, TINY_TRAINER
from tests.support.ports import free_port
from tests.support.systemd_units import EXAMPLES, LAUNCHER, SERVICES, SYSTEMD, command_line, environment_file, settings
from tests.support.waiting import wait_for

ANALYZE = shutil.which("systemd-analyze")

needs_analyze = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    return subprocess.run([ANALYZE, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@needs_analyze
@pytest.mark.parametrize("name", [*SERVICES, "edgeflame-train@.timer"])
def test_a_unit_is_clean(name: str, tmp_path: Path) -> None:
    for path in SYSTEMD.glob("edgeflame*@.*" if "@" in name else name):
        # The program is there only where it is installed.
        (tmp_path / path.name).write_text(path.read_text().replace(LAUNCHER, "/bin/true"))
    done = analyze("verify", tmp_path / name)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "edgeflame" in line]
    assert (done.returncode, complaints) == (0, [])


@needs_analyze
def test_a_mistake_in_a_unit_would_be_seen(tmp_path: Path) -> None:
    broken = tmp_path / "edgeflame-broken.service"
    broken.write_text("[Service]\nExecStart=/bin/true\nProtectSytem=strict\n")
    assert "ProtectSytem" in analyze("verify", broken).stderr


@needs_analyze
@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_is_as_closed_as_the_documentation_says(name: str) -> None:
    done = analyze("security", "--offline=true", SYSTEMD / name)
    score = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    stated = re.search(rf"\| `{re.escape(name)}` \|.*\| ([\d.]+) \|", (REPOSITORY / "docs" / "deploy.md").read_text())
    assert score is not None
    assert stated is not None, f"docs/deploy.md states no score of {name}"
    # Other versions of systemd weigh a little differently.
    assert float(score[1]) <= float(stated[1]) + 0.3


@pytest.mark.parametrize("name", SERVICES)
def test_an_error_that_no_restart_heals_ends_a_service(name: str) -> None:
    unit = settings(name)
    never = {int(code) for code in unit["RestartPreventExitStatus"][0].split()}
    assert never >= {kind.exit_code for kind in (UsageError, ConfigError, MissingDependencyError)}
    assert unit["SuccessExitStatus"] == [str(EXIT_INTERRUPTED)]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", _exit_codes(), re.MULTILINE)}
    assert never <= documented


def _exit_codes() -> str:
    return (REPOSITORY / "docs" / "exit-codes.md").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_says_what_it_writes_and_where_its_log_goes(name: str) -> None:
    unit = settings(name)
    (line,) = unit["ExecStart"]
    (state,) = unit["StateDirectory"]
    assert f"--state /var/lib/{state} " in f"{line} "
    # Left out, the log would follow standard output to where nobody reads it.
    assert unit["StandardError"] == ["journal"]


@pytest.mark.parametrize(("name", "kind"), [("aggregator", "aggregate"), ("line", "inspect")])
def test_the_examples_are_right(name: str, kind: str) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--json", "--config", str(EXAMPLES / f"{name}.toml")])
    (finding,) = [found for found in json.loads(result.stdout) if found["check"] == "configuration"]
    assert finding["level"] == "ok", finding
    assert f"edgeflame {kind}" in finding["what"]


def test_the_example_of_a_site_is_right() -> None:
    from cli.train import SiteFile
    from edgeflame.config import load_config

    assert load_config(EXAMPLES / "site.toml", SiteFile).data == "/srv/edgeflame/plant-a"


class Services:
    """The services' own command lines on a machine whose folders are below ``root``; a context manager."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.etc, self.state = root / "etc", root / "lib"
        self._places = {"/etc/edgeflame": self.etc, "/var/lib/edgeflame": self.state}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for folder in (self.etc / "sites", self.etc / "lines"):
            folder.mkdir(parents=True)

    def start(self, name: str, kit: Path, instance: str = "", **environment: str) -> None:
        """As the unit does: its environment, its credential, its ``ExecStart``."""
        credentials = self._root / f"credentials-{name}-{instance}"
        credentials.mkdir()
        shutil.copy(kit, credentials / "kit")
        defaults = dict(value.split("=", 1) for value in settings(name)["Environment"])
        known = {**defaults, **environment, "CREDENTIALS_DIRECTORY": str(credentials)}
        command = [sys.executable, "-m", "edgeflame", *command_line(name, instance, known, self._places)]
        with self.log(name, instance).open("ab") as log:
            self._processes[name + instance] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **known, "XDG_CACHE_HOME": str(self._root)},
            )

    def log(self, name: str, instance: str = "") -> Path:
        return self._root / f"{name}{instance}.log"

    def wait(self, name: str, instance: str = "") -> int:
        """For its end; the exit code."""
        return self._processes[name + instance].wait(timeout=60)

    def stop(self, name: str, instance: str = "") -> int:
        """As `systemctl stop` does; the exit code."""
        self._processes[name + instance].send_signal(signal.SIGTERM)
        return self.wait(name, instance)

    def __enter__(self) -> Services:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for name, process in self._processes.items():
            process.kill()
            process.wait()
            if kind is not None:
                print(f"---- {name}\n{(self._root / f'{name}.log').read_text()[-3000:]}")


def test_the_command_lines_of_the_units_run_a_fleet_and_a_line(tmp_path: Path, package_file: Path) -> None:
    aggregate, train, inspect = SERVICES
    port, *pages = (free_port() for _ in range(5))
    fleet = _fleet(tmp_path / "fleet", port)
    kits = fleet / "kits"
    with (
        BrokerProcess("mosquitto", fleet, config=fleet / "broker" / "mosquitto.conf", port=port),
        Services(tmp_path) as services,
    ):
        (services.etc / "aggregator.toml").write_text((EXAMPLES / "aggregator.toml").read_text() + "\n")
        services.start(
            aggregate, kits / "aggregator.kit", EDGEFLAME_METRICS=f"127.0.0.1:{pages[0]}", EDGEFLAME_ARGS="--rounds 1"
        )
        for site, page in (("plant-a", pages[1]), ("plant-b", pages[2])):
            (tmp_path / "data").mkdir(exist_ok=True)
            out = services.state / "sites" / site / "own.edgeflame"
            (services.etc / "sites" / f"{site}.toml").write_text(f'data = "{tmp_path / "data"}"\nout = "{out}"\n')
            worker = shlex.join([sys.executable, str(TINY_TRAINER)])
            services.start(
                train, kits / f"{site}.kit", site, EDGEFLAME_METRICS=f"127.0.0.1:{page}",
                EDGEFLAME_ARGS=f"--worker {shlex.quote(worker)}",
            )  # fmt: skip
        example = (EXAMPLES / "line.toml").read_text()
        example = example.replace("mqtts://broker.plant.example:8883", f"mqtts://localhost:{port}")
        example = example.replace("127.0.0.1:8080", f"127.0.0.1:{pages[3]}")
        example = example.replace("camera:0", "boards:warm_wood?parts=1000000&size=64")
        example = example.replace("/etc/edgeflame/lines/board.edgeflame", str(package_file))
        kit = f"{tmp_path}/credentials-{inspect}-line-1/kit"
        credential = "/run/credentials/edgeflame-inspect@line-1.service/kit"
        assert credential in example
        (services.etc / "lines" / "line-1.toml").write_text(example.replace(credential, kit))
        services.start(inspect, kits / "line-1.kit", "line-1")
        assert [services.wait(train, site) for site in ("plant-a", "plant-b")] == [0, 0]
        assert (services.state / "sites" / "plant-a" / "own.edgeflame").exists()
        wait_for(lambda: 'phase="done"} 1.0' in _page(pages[0]), "the aggregator stays and says that the run is done")
        wait_for(
            lambda: _metric(_page(pages[3]), 'edgeflame_parts_total{camera="top",verdict="fail"}') > 0,
            "parts are judged",
        )
        wait_for(lambda: _metric(_page(pages[3]), 'edgeflame_outbox_waiting{destination="mqtt"}') < 5, "delivered")
        assert (services.stop(aggregate), services.stop(inspect, "line-1")) == (0, EXIT_INTERRUPTED)
    assert list((services.state / "lines" / "line-1" / "rejects").iterdir())


def test_the_examples_of_the_environment_files_are_read(tmp_path: Path) -> None:
    line = tmp_path / "line.env"
    line.write_text((EXAMPLES / "line.env").read_text().replace("#EDGEFLAME_", "EDGEFLAME_"))
    words = command_line("edgeflame-inspect@.service", "line-1", environment_file(line), {})
    assert words[-4:] == ["--device", "cpu", "--public-key", "/etc/edgeflame/lines/edgeflame-key.pub"]
    site = environment_file(EXAMPLES / "site.env")
    known = {**site, "CREDENTIALS_DIRECTORY": "/run/c"}
    assert command_line("edgeflame-train@.service", "plant-a", known, {})[-2:] == ["--metrics", "127.0.0.1:9465"]


def _fleet(folder: Path, port: int) -> Path:
    make_fleet(
        folder, fleet="boards", hosts=["localhost"], port=port, bind="127.0.0.1", install_dir=None, plugin=None,
        broker_user="root" if os.getuid() == 0 else None, replace=False,
    )  # fmt: skip
    with open_fleet(folder) as fleet:
        for site in ("plant-a", "plant-b"):
            fleet.enrol(site, role="site", days=10, out=None, reinstate=False)
        fleet.enrol("line-1", role="line", days=10, out=None, reinstate=False)
        fleet.write_access()
    return folder


def _page(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def _metric(page: str, name: str) -> float:
    """NaN where it is not there: then nothing holds of it."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else float("nan")
