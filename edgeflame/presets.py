"""What a learning's settings start from before a file or the command line changes them.

``preset = "default"`` is what measured best here, and is written in the structs themselves but for what depends on the
method. ``preset = "paper"`` is what the FLAME paper prints, for comparison: its momentum of 0.09 (probably meant to be
0.9) and its absolute noise of 0.015 included. It has one learning rate for backbone and discriminator, gives no tau
(0.5 here), and does not average embeddings over neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edgeflame.learning import Learning

ANY_METHOD = "*"

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        # As long as ten rounds of a federation.
        "solo": {"training": {"epochs": 10}},
    },
    "paper": {
        ANY_METHOD: {
            "backbone": {"neighbourhood": 1},
            "training": {
                "epochs": 10,
                "learning_rate": 0.01,
                "discriminator_learning_rate": 0.01,
                "momentum": 0.09,
                "weight_decay": 1e-5,
                "batch_size": 32,
                "noise_std": 0.015,
                "noise_scale": "absolute",
                "margin": 0.5,
                "distillation_weight": 0.5,
                "proximal_weight": 0.01,
                "contrast_weight": 1.0,
            },
        },
        "solo": {"training": {"epochs": 200}},
    },
}
"""By name and method: settings as a file would give them."""


def start_from_presets(raw: dict[str, Any], kind: type) -> dict[str, Any]:
    """Put a file's settings over those of the preset they name, wherever ``kind`` holds a :class:`Learning`.

    Args:
        raw: as read from a file; not checked yet, so it may hold anything.
        kind: what it is to be decoded as.
    """
    if kind is Learning:
        return _start(raw, Learning())
    if not issubclass(kind, msgspec.Struct):
        return raw
    filled = dict(raw)
    for field in msgspec.structs.fields(kind):
        section = raw.get(field.encode_name)
        if field.type is Learning and isinstance(section, dict):
            default = field.default if isinstance(field.default, Learning) else Learning()
            filled[field.encode_name] = _start(section, default)
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct) and isinstance(section, dict):
            filled[field.encode_name] = start_from_presets(section, field.type)
    return filled


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both say something, the upper counts."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = overlay(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _start(raw: dict[str, Any], default: Learning) -> dict[str, Any]:
    named = {"method": default.method, "preset": default.preset, **raw}
    # A name that is none is told when this is decoded.
    by_method = PRESETS.get(str(named["preset"]), {})
    settings = overlay(by_method.get(ANY_METHOD, {}), by_method.get(str(named["method"]), {}))
    return overlay(settings, named)
