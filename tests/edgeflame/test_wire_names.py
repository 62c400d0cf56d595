"""Names that leave the process: a class may be renamed, what it is called on the wire and on the disk may not.

The table is written out, so that a changed tag fails here, and the source is read, so that no tag is made of the name
of its class.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from aggregator.control import OperatorRequest
from aggregator.events import Event
from aggregator.simulation.config import BoardsData, FolderData
from edge.commands.messages import Command
from edgeflame.mark_shapes import Shape
from edgeflame.mqtt.messages import DownMessage, Presence, RoundState, UpMessage
from edgeflame.mqtt.release_messages import LineModels, Release
from edgeflame.simulation import SimulationAnswer, SimulationTask
from fleet import observe
from trainer.agent.plan import PlanStep
from trainer.agent.tasks import FromWorker, ToWorker

REPOSITORY = Path(__file__).resolve().parents[2]

TAGS: dict[str, tuple[Any, str, set[str]]] = {
    "what a site says": (
        UpMessage,
        "type",
        {"hello", "heartbeat", "offer", "need", "failed", "finished", "leaving"},
    ),
    "what the aggregator says to a site": (
        DownMessage,
        "type",
        {"welcome", "turned_away", "need", "receipt", "refusal"},
    ),
    "what is retained": (
        RoundState | Presence | Release | LineModels,
        "type",
        {"round", "presence", "release", "line_models"},
    ),
    "facts of the journal": (
        Event,
        "fact",
        {
            "run_started",
            "site_joined",
            "source_chosen",
            "initial_accepted",
            "initial_refused",
            "round_started",
            "update_accepted",
            "update_refused",
            "round_closed",
            "model_made",
            "statistics_made",
            "site_finished",
            "site_not_finished",
            "site_paused",
            "site_resumed",
            "site_left",
            "last_round",
            "run_ended",
        },
    ),
    "requests to an aggregator": (
        OperatorRequest,
        "request",
        {"stop", "finish", "pause", "resume", "remove"},
    ),
    "commands to a line": (
        Command,
        "command",
        {
            "pause",
            "resume",
            "threshold",
            "snapshot",
            "product",
            "golden",
            "acknowledge",
            "drift",
            "mark",
            "rollback",
            "switch_model",
            "teach",
            "reload",
            "describe",
        },
    ),
    "where a mark is": (
        Shape,
        "shape",
        {"polygon", "brush"},
    ),
    "what a worker reads": (
        ToWorker,
        "type",
        {"setup", "initial", "train", "statistics", "finish"},
    ),
    "what a worker answers": (
        FromWorker,
        "type",
        {"ready", "step", "done", "problem"},
    ),
    "what a simulation asks": (
        SimulationTask,
        "type",
        {"site", "measure"},
    ),
    "what a simulation hears": (
        SimulationAnswer,
        "type",
        {"site", "measure", "problem"},
    ),
    "data of a simulation": (
        FolderData | BoardsData,
        "kind",
        {"folder", "boards"},
    ),
}

STEPS = {
    "wait",
    "prepare",
    "fetch",
    "train",
    "offerinitial",
    "offerupdate",
    "gather",
    "offerstatistics",
    "finish",
    "report",
    "tellfailure",
    "leave",
}
"""What heartbeats and the metric ``edgeflame_site_activity`` call the steps of a site."""


@pytest.mark.parametrize(("union", "field", "tags"), TAGS.values(), ids=TAGS)
def test_the_tags_stay(union: Any, field: str, tags: set[str]) -> None:
    kinds = get_args(union)
    assert {kind.__struct_config__.tag for kind in kinds} == tags
    assert {kind.__struct_config__.tag_field for kind in kinds} == {field}


def test_the_names_of_the_steps_stay() -> None:
    kinds = get_args(PlanStep)
    assert {kind.wire_name for kind in kinds} == STEPS
    assert len(kinds) == len(STEPS)


def test_the_fleets_view_knows_the_steps() -> None:
    # Of a site that leaves nothing is seen any more.
    assert set(observe._ACTIVITY_TEXTS) == STEPS - {"leave"}
    assert {*observe._UPLOADS, *observe._DOWNLOADS} <= STEPS


def classes() -> Iterator[tuple[str, ast.ClassDef, dict[str | None, ast.expr]]]:
    """Of the program: where it stands, the class, and its keywords."""
    packages = {path.parent for path in REPOSITORY.glob("*/__init__.py")} - {REPOSITORY / "tests"}
    for path in sorted(path for package in packages for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where = f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}"
                yield where, node, {keyword.arg: keyword.value for keyword in node.keywords}


def test_no_tag_is_made_of_the_name_of_its_class() -> None:
    every = list(classes())
    bases = {node.name for _, node, given in every if "tag_field" in given and "tag" not in given}
    assert bases
    made = []
    for where, node, given in every:
        is_below = any(ast.unparse(base).rpartition(".")[2] in bases for base in node.bases)
        if is_below or "tag" in given:
            tag = given.get("tag")
            if not (isinstance(tag, ast.Constant) and isinstance(tag.value, str)):
                made.append(where)
    assert not made
