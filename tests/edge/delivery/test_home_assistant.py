"""Home Assistant's discovery messages, with their templates rendered as it renders them."""

from __future__ import annotations

from typing import Any

import jinja2
import msgspec
import pytest

from edge.delivery.home_assistant import home_assistant_discovery, outdated_discovery
from edge.delivery.outbox import Delivery
from edgeflame.mqtt.topics import Topics
from tests.support.inspection_results import result


def entities(*cameras: str) -> dict[str, dict[str, Any]]:
    told = home_assistant_discovery("homeassistant", Topics(fleet="f1"), "l1", cameras)
    return {topic: msgspec.json.decode(payload) for topic, payload in told}


def shown(entity: dict[str, Any], camera: str, verdict: str, score: float | None, before: str = "unknown") -> str:
    """The entity's state after a result, where it was ``before``."""
    told = msgspec.structs.replace(result(0, verdict), camera=camera, score=score, threshold=2.0)
    delivery = Delivery(outbox="o", number=1, redelivered=False, result=msgspec.Raw(msgspec.json.encode(told)))
    template = jinja2.Environment(autoescape=False).from_string(entity["value_template"])
    return template.render(value_json=msgspec.json.decode(delivery.encode()), this={"state": before})


def test_one_camera_is_the_line() -> None:
    told = entities("camera")
    assert list(told) == [
        "homeassistant/sensor/edgeflame_f1_l1/verdict/config",
        "homeassistant/sensor/edgeflame_f1_l1/score/config",
    ]
    verdict, score = told.values()
    assert verdict["state_topic"] == "edgeflame/v1/f1/line/l1/result"
    # With "online" and "offline", which Home Assistant expects where it is told nothing else.
    assert verdict["availability_topic"] == "edgeflame/v1/f1/line/l1/availability"
    assert shown(verdict, "camera", "fail", 3.0) == "fail"
    assert shown(score, "camera", "fail", 3.0) == "1.5"
    assert shown(score, "camera", "unknown", None) == "None"
    assert score["state_class"] == "measurement"
    assert "state_class" not in verdict, "words have none"


def test_each_of_several_cameras_has_entities_that_heed_no_other() -> None:
    told = entities("left", "right.2")
    assert len({entity["unique_id"] for entity in told.values()}) == 4
    verdict = told["homeassistant/sensor/edgeflame_f1_l1/left_verdict/config"]
    assert verdict["name"] == "left: Verdict"
    assert shown(verdict, "left", "fail", 3.0, before="pass") == "fail"
    assert shown(verdict, "right.2", "fail", 3.0, before="pass") == "pass"
    score = told["homeassistant/sensor/edgeflame_f1_l1/right_2_score/config"]
    assert shown(score, "right.2", "pass", 1.0, before="9") == "0.5"
    assert shown(score, "left", "unknown", None, before="9") == "9"
    assert shown(score, "left", "pass", 1.0, before="unknown") == "None", "a number or nothing"


def test_no_two_lines_and_no_two_cameras_are_taken_for_one() -> None:
    lines = [("plant_a", "1"), ("plant", "a_1"), ("plant.a", "1"), ("plant", "a.1"), ("plant-a", "1"), ("plant", "a-1")]
    topics = [
        topic for fleet, line in lines for topic, _ in home_assistant_discovery("ha", Topics(fleet=fleet), line, ["c"])
    ]
    assert len(set(topics)) == 2 * len(lines)
    assert "ha/sensor/edgeflame_plant_a_1/score/config" in topics, "the name of the one that can mean nobody else stays"
    told = entities("a.b", "a_b", "c.d")
    assert len({entity["unique_id"] for entity in told.values()}) == len(told) == 6
    assert "homeassistant/sensor/edgeflame_f1_l1/c_d_verdict/config" in told
    assert all("." not in topic for topic in told)


def test_what_was_taken_out_is_outdated_and_so_is_a_former_name() -> None:
    def gone(fleet: str, now: list[str], before: list[str]) -> list[str]:
        return outdated_discovery("ha", Topics(fleet=fleet), "l", now, before)

    assert gone("f", ["a", "b"], []) == gone("f", ["a", "b"], ["b", "a"]) == []
    assert gone("f", ["a", "b"], ["a", "b", "c"]) == [
        "ha/sensor/edgeflame_f_l/c_score/config",
        "ha/sensor/edgeflame_f_l/c_verdict/config",
    ]
    assert gone("f", ["a"], ["a", "b"])[0] == "ha/sensor/edgeflame_f_l/a_score/config", "one camera is the line"
    assert gone("f.1", ["a"], []) == [f"ha/sensor/edgeflame_f_1_l/{key}/config" for key in ("score", "verdict")]


@pytest.mark.parametrize("prefix", ["homeassistant", "ha/devices"])
def test_the_prefix_is_the_configurations(prefix: str) -> None:
    assert all(
        topic.startswith(f"{prefix}/sensor/")
        for topic, _ in home_assistant_discovery(prefix, Topics(fleet="f"), "l", ["a"])
    )
