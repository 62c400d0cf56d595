"""What a site minimises: a small module each, and one entry in ``OBJECTIVES``.

A method is an objective here and, in a federation, a rule of the aggregator; the training loop knows neither.
"""

from __future__ import annotations

from trainer.objectives.fade import fade
from trainer.objectives.fedprox import fedprox
from trainer.objectives.flame import flame
from trainer.objectives.interface import ObjectiveFactory
from trainer.objectives.moon import moon
from trainer.objectives.scaffold import scaffold

OBJECTIVES: dict[str, ObjectiveFactory] = {
    "fade": fade,
    "fedprox": fedprox,
    "flame": flame,
    "moon": moon,
    "scaffold": scaffold,
}
"""By the name that ``edgeflame.methods.METHODS`` uses."""

WITH_TEACHERS = frozenset({"flame", "moon"})
"""Those that compare the model in training with the global one and the site's last one, which are loaded for them."""
