"""The reference pages say what the code says: keys, options, topics, metrics, exit codes."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

from aggregator.config import AggregateConfig
from aggregator.events import RunStarted, initial_state
from aggregator.metrics import RunStatus, prometheus_metrics
from edgeflame.errors import EXIT_INTERRUPTED, EdgeFlameError
from edgeflame.metrics import Metric
from edgeflame.mqtt import topics
from tests.support.paths import REPOSITORY
from trainer.agent.metrics import SiteMetrics

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_reference"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_committed_pages_are_those_made_from_the_code(reference: ModuleType) -> None:
    for name, text in reference.pages().items():
        assert (DOCS / "reference" / name).read_text() == text, f"docs/reference/{name} is old: run `make reference`"


def test_every_configuration_key_is_described(reference: ModuleType) -> None:
    bare = [
        f"{section.kind.__module__}.{section.kind.__name__}.{key.name}"
        for _, _, kind in reference._files()
        for section in reference.sections(kind)
        for key in section.keys
        if key.name not in reference.attribute_docstrings(section.kind) and key.meaning != reference.TAG_MEANING
    ]
    assert not bare, "keys without a docstring"


def test_what_a_key_may_be_is_found_in_the_code(reference: ModuleType) -> None:
    text = reference.configuration_page()
    assert "| `workers` | integer, 0..10000 | `0` | Processes (`local`; 0: none but this one)" in text
    assert "[`[training]` of fit](#training-of-fit)" not in text
    assert "### `[mqtt]` of inspect" in text


def test_every_topic_is_documented_and_none_that_is_not_there() -> None:
    drawn = set(re.findall(r"^    (edgeflame/v1/\S+)", topics.__doc__ or "", re.MULTILINE))
    assert said() == drawn
    text = "\n".join(page.read_text() for page in DOCS.glob("*.md"))
    assert set(re.findall(r"edgeflame/v1/<fleet>/[^\s`|,]+", text)) == drawn


def said() -> set[str]:
    """Every topic the code says something on, with placeholders; filters of many topics are none."""
    fleet = topics.Topics(fleet="FLEET")
    found = set()
    for name, member in vars(topics.Topics).items():
        if isinstance(member, property) and name != "base":
            found.add(getattr(fleet, name))
        elif inspect.isfunction(member) and not name.startswith("_") and name != "parse":
            names = list(inspect.signature(member).parameters)[1:]
            found.add(member(fleet, *(f"<{'chunk' if name == 'index' else name}>" for name in names)))
    return {unquote(topic).replace("FLEET", "<fleet>") for topic in found if not re.search(r"[+#]", topic)}


def test_every_metric_of_a_run_is_documented_and_none_that_is_not_there(tmp_path: Path) -> None:
    state = initial_state(RunStarted(run="0" * 32, config=AggregateConfig(), time="2026-01-02T03:04:05Z"))
    snapshot = RunStatus(
        state=state, num_online=0, phase_s=0.0, last_round_s=None, progress_age_s=0.0, progress_at=0.0,
        is_connected=False, bytes_in=0, bytes_out=0, free_bytes=0,
    )  # fmt: skip
    shown: list[Metric] = list(prometheus_metrics(snapshot))

    class Server:
        def show(self, figures: list[Metric]) -> None:
            shown.extend(figures)

    watch = SiteMetrics(tmp_path, Server())  # type: ignore[arg-type]
    watch.publish(("idle", 0, 0), None, link=None, is_up=False, is_welcome=False, now=0.0)
    documented = re.findall(r"^\| `(edgeflame_\w+)`", (DOCS / "fleet.md").read_text(), re.MULTILINE)
    names = {f"{metric.name}_total" if metric.kind == "counter" else metric.name for metric in shown}
    assert sorted(documented) == sorted(names)


def test_every_exit_code_is_documented_and_none_that_is_not_there() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (DOCS / "exit-codes.md").read_text(), re.MULTILINE)}
    kinds = [EdgeFlameError, *EdgeFlameError.__subclasses__()]
    assert documented == {0, EXIT_INTERRUPTED, *(kind.exit_code for kind in kinds)}


def test_every_event_that_troubleshooting_names_is_logged_somewhere() -> None:
    table = (DOCS / "troubleshooting.md").read_text().partition("## By event of the log")[2]
    named = {
        event for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for event in re.findall(r"`(\w+)`", row)
    }
    folders = ("edge", "edgeflame", "aggregator", "trainer", "export", "fleet", "fitting", "cli")
    sources = (path for folder in folders for path in (DOCS.parent / folder).rglob("*.py"))
    logged = {event for path in sources for event in re.findall(r'"([a-z][a-z_]+)"', path.read_text())}
    assert len(named) >= 25
    assert named <= logged
