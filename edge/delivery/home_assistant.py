"""Home Assistant's discovery: retained messages by which verdicts and scores appear there by themselves.

An entity lives as long as its message is retained; an empty one takes it away. Source: Home Assistant's documentation
of MQTT discovery and of the MQTT sensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from edgeflame.mqtt.topics import Topics

_ENTITIES: dict[str, tuple[str, str, dict[str, str]]] = {
    "verdict": ("Verdict", "value_json.result.verdict", {}),
    "score": (
        "Score, 1 = at the threshold",
        (
            "(value_json.result.score / value_json.result.threshold) | round(3) "
            "if value_json.result.score is not none else none"
        ),
        {"state_class": "measurement"},
    ),
}
"""Name, value template and further properties of each entity, by key."""

_KEPT = {"verdict": "this.state", "score": "(none if this.state in ['unknown', 'unavailable'] else this.state)"}
"""An entity's state when a message is another camera's: all cameras share one topic. A score is a number or nothing."""


def home_assistant_discovery(prefix: str, topics: Topics, line: str, cameras: Sequence[str]) -> list[tuple[str, bytes]]:
    """Discovery messages for the verdict and the score, of each camera if there are several: topic and payload.

    Args:
        prefix: beginning of Home Assistant's discovery topics.
        topics: the fleet's.
        line: the line's name.
        cameras: the cameras' names.
    """
    unique = _unique_id(topics.fleet, line)
    messages = []
    for camera in cameras if len(cameras) > 1 else [None]:
        for key, (name, value, more) in _ENTITIES.items():
            own, title, template = key, name, value
            if camera is not None:
                own, title = f"{_camera_id(camera, cameras)}_{key}", f"{camera}: {name}"
                template = f"({value}) if value_json.result.camera == '{camera}' else {_KEPT[key]}"
            entity = {
                "state_topic": topics.line_result(line),
                "availability_topic": topics.line_availability(line),
                "device": {"identifiers": [unique], "name": f"Line {line}", "manufacturer": "EdgeFlame"},
                "name": title,
                "unique_id": f"{unique}_{own}",
                "value_template": f"{{{{ {template} }}}}",
                **more,
            }
            messages.append((f"{prefix}/sensor/{unique}/{own}/config", msgspec.json.encode(entity)))
    return messages


def outdated_discovery(
    prefix: str, topics: Topics, line: str, cameras: Sequence[str], before: Sequence[str]
) -> list[str]:
    """The topics of entities that are no longer there: of cameras that were taken out, or under a former name.

    Args:
        prefix: beginning of Home Assistant's discovery topics.
        topics: the fleet's.
        line: the line's name.
        cameras: the cameras' names.
        before: those of the cameras that were announced before.
    """
    present = {topic for topic, _ in home_assistant_discovery(prefix, topics, line, cameras)}
    past = [topic for topic, _ in home_assistant_discovery(prefix, topics, line, before)] if before else []
    unique, plain = _unique_id(topics.fleet, line), _plain(f"edgeflame_{topics.fleet}_{line}")
    former = [topic.replace(unique, plain) for topic in (*present, *past)] if unique != plain else []
    return sorted({*past, *former} - present)


def _unique_id(fleet: str, line: str) -> str:
    """The line's name in Home Assistant, which has neither dots nor slashes: no two lines of any fleets share one."""
    plain = _plain(f"edgeflame_{fleet}_{line}")
    if "_" in fleet or "." in fleet or "." in line:
        # Of plant_a and 1, and of plant and a_1, the same would come out.
        return f"{plain}_{hashlib.sha256(f'{fleet}/{line}'.encode()).hexdigest()[:8]}"
    return plain


def _camera_id(camera: str, cameras: Sequence[str]) -> str:
    plain = _plain(camera)
    if plain != camera and any(other != camera and _plain(other) == plain for other in cameras):
        return f"{plain}_{hashlib.sha256(camera.encode()).hexdigest()[:8]}"
    return plain


def _plain(name: str) -> str:
    return name.replace(".", "_")
