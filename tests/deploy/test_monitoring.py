"""Alerts and dashboard: right to promtool, of documented metrics only, and answered by a real Prometheus."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.brokers import BrokerProcess
from tests.support.paths import REPOSITORY, TINY_TRAINER
from tests.support.ports import free_port
from tests.support.waiting import wait_for

RULES = REPOSITORY / "deploy" / "prometheus" / "edgeflame.rules.yml"
RULE_TESTS = RULES.with_name("edgeflame.test.yml")
CONFIG = RULES.with_name("prometheus.yml")
DASHBOARD = REPOSITORY / "deploy" / "grafana" / "edgeflame.json"
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")

# What only an event makes, or a line that has a reference, golden parts or triggers.
_OF_EVENTS = (
    "_refusals", "_reasons_total", "_frames_dropped_total", "_certificate_expiry_", "_drift", "_golden_", "_missing_",
    "_late_", "triggers_lost",
)  # fmt: skip


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def targets(node: object) -> Iterator[dict[str, Any]]:
    """Every query of the dashboard, its variables filled in for all."""
    if isinstance(node, dict):
        if "expr" in node:
            yield node
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def queries() -> list[str]:
    filled = {"$line": ".*", "$camera": ".*", "$__rate_interval": "30s"}
    found = []
    for target in targets(json.loads(DASHBOARD.read_text())):
        text = target["expr"]
        for variable, value in filled.items():
            text = text.replace(variable, value)
        assert "$" not in text, text
        found.append(text)
    return found


def documented_metrics() -> set[str]:
    pages = "".join((REPOSITORY / "docs" / name).read_text() for name in ("inspection.md", "fleet.md"))
    return set(re.findall(r"^\| `(edgeflame_\w+)`", pages, re.MULTILINE))


@needs_promtool
def test_rules_and_configuration_are_clean() -> None:
    for command, path in (("rules", RULES), ("config", CONFIG)):
        done = promtool("check", command, path)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_alert_fires_when_it_should_and_not_before() -> None:
    tested = {test["name"] for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]}
    assert tested == set(alerts())
    done = promtool("test", "rules", RULE_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_an_alert_that_does_not_fire_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / RULES.name).write_text(
        RULES.read_text().replace("edgeflame_camera_up == 0", "edgeflame_camera_up == 2")
    )
    shutil.copy(RULE_TESTS, tmp_path)
    done = promtool("test", "rules", tmp_path / RULE_TESTS.name)
    assert done.returncode == 1
    assert "EdgeFlameCameraLost" in done.stdout + done.stderr


def test_alerts_and_dashboard_ask_for_documented_metrics_alone() -> None:
    known = documented_metrics()
    asked = queries() + [rule["expr"] for rule in alerts().values()]
    names = {name for text in asked for name in re.findall(r"\bedgeflame_\w+", re.sub(r'"[^"]*"', "", text))}
    histograms = {f"{name}_bucket" for name in known if name.endswith(("_seconds", "_ratio"))}
    assert names - known - histograms == set()
    assert len(names) > 30


def test_every_alert_says_what_and_what_to_do_and_is_in_the_documentation() -> None:
    page = (REPOSITORY / "docs" / "deploy.md").read_text()
    for name, rule in alerts().items():
        assert set(rule["annotations"]) == {"summary", "action"}, name
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert f"`{name}`" in page, name


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references) > 0
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert variables == {"datasource", "line", "camera"}


class Prometheus:
    """The real one, on our configuration with other targets; a context manager."""

    def __init__(self, folder: Path, targets_of: dict[str, int]) -> None:
        config = yaml.safe_load(CONFIG.read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{targets_of[job['job_name']]}"]}]
        shutil.copy(RULES, folder)
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [PROMETHEUS, f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=self._log, stderr=self._log
        )

    def ask(self, path: str, **parameters: str) -> Any:
        """Of its API; None while it does not listen. A query that it refuses fails the test."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as exc:
            if exc.code == 503:
                return None
            pytest.fail(f"{parameters}: {exc.read().decode()}")
        except OSError:
            return None

    def has(self, query: str) -> bool:
        """Whether a query gives any series."""
        answer = self.ask("query", query=query)
        return answer is not None and bool(answer["result"])

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed")
def test_a_real_prometheus_answers_every_query_of_dashboard_and_alerts(tmp_path: Path, package_file: Path) -> None:
    ports = {f"edgeflame-{role}": free_port() for role in ("line", "aggregator", "site")}
    gate = tmp_path / "gate"
    gate.mkdir()
    (tmp_path / "line.toml").write_text(
        f'[products]\nsmall = "{package_file}"\n'
        '[cameras.top]\nsource = "boards:warm_wood?parts=1000000&size=64"\n'
        '[cameras.side]\nsource = "boards:warm_wood?parts=1000000&size=64&seed=1"\n'
        f'[web]\nlisten = "127.0.0.1:{ports["edgeflame-line"]}"\n'
        f'[modbus]\nhost = "127.0.0.1"\nport = {free_port()}\n'
        '[mqtt]\nbroker = "BROKER"\nfleet = "test"\nline = "line-1"\n'
    )
    with ExitStack() as stack:
        broker = stack.enter_context(BrokerProcess("embedded", tmp_path))
        line = tmp_path / "line.toml"
        line.write_text(line.read_text().replace("BROKER", broker.url))
        (tmp_path / "data").mkdir()
        fleet = ["--broker", broker.url, "--fleet", "test", "--metrics"]
        worker = shlex.join([sys.executable, str(TINY_TRAINER)])
        for name, arguments in {
            "line": ["inspect", "--config", line, "--state", tmp_path / "line", "--json"],
            "aggregator": [
                "aggregate", *fleet, f":{ports['edgeflame-aggregator']}", "--sites", "1", "--state", tmp_path / "agg",
            ],
            "site": [
                "train", *fleet, f":{ports['edgeflame-site']}", "--site", "a", "--state", tmp_path / "site",
                "--data", tmp_path / "data", "--worker", worker,
            ],
        }.items():  # fmt: skip
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "edgeflame", *map(str, arguments)],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TINY_GATE": str(gate), "OMP_NUM_THREADS": "1"},
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        prometheus = stack.enter_context(Prometheus(tmp_path, ports))
        wait_for(lambda: prometheus.has('edgeflame_aggregator_phase{phase="train"} == 1'), "a round is open")
        for query in queries():
            if any(name in query for name in _OF_EVENTS):
                assert prometheus.ask("query", query=query) is not None
            else:
                wait_for(lambda query=query: prometheus.has(query), f"there are series of {query}")
        # The PLC is away from the beginning: an alert takes its way through a real Prometheus.
        wait_for(
            lambda: prometheus.has('ALERTS{alertname="EdgeFlamePlcAway",camera="top",alertstate="pending"}'),
            "the alert is pending",
        )
        health = {
            rule["name"]: (rule["health"], rule.get("lastError"))
            for group in prometheus.ask("rules")["groups"]
            for rule in group["rules"]
        }
        assert health == dict.fromkeys(alerts(), ("ok", None))
        assert {target["health"] for target in prometheus.ask("targets")["activeTargets"]} == {"up"}
