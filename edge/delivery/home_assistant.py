"""What makes a line's verdicts and scores appear in Home Assistant by themselves. Pure.

Source: Home Assistant's documentation of MQTT discovery and of the MQTT sensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgeflame.topics import Topics

_ENTITIES = {
    "verdict": ("Verdict", "value_json.result.verdict"),
    "score": (
        "Score, 1 = at the threshold",
        (
            "(value_json.result.score / value_json.result.threshold) | round(3) "
            "if value_json.result.score is not none else none"
        ),
    ),
}
"""Name and template, by key."""


def discovery(prefix: str, topics: Topics, line: str, cameras: Sequence[str]) -> list[tuple[str, bytes]]:
    """Configuration messages, retained: the verdict and the score, of each camera where there are several.

    Args:
        prefix: of Home Assistant's discovery topics.
        topics: of the fleet.
        line: its name.
        cameras: their names.
    """
    unique = f"edgeflame_{topics.fleet}_{line}".replace(".", "_")
    told = []
    for camera in cameras if len(cameras) > 1 else [None]:
        for key, (name, value) in _ENTITIES.items():
            own, title, template = key, name, value
            if camera is not None:
                own, title = f"{camera}_{key}".replace(".", "_"), f"{camera}: {name}"
                # All cameras speak on one topic; an entity keeps its state while another camera speaks.
                template = f"({value}) if value_json.result.camera == '{camera}' else this.state"
            entity = {
                "state_topic": topics.line_result(line),
                "availability_topic": topics.line_state(line),
                "availability_template": "{{ 'online' if value_json.online else 'offline' }}",
                "device": {"identifiers": [unique], "name": f"Line {line}", "manufacturer": "EdgeFlame"},
                "name": title,
                "unique_id": f"{unique}_{own}",
                "value_template": f"{{{{ {template} }}}}",
            }
            told.append((f"{prefix}/sensor/{unique}/{own}/config", msgspec.json.encode(entity)))
    return told
