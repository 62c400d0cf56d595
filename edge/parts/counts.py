"""What became of the parts of one camera, counted since the start."""

from __future__ import annotations

import msgspec


class PartCounts(msgspec.Struct, kw_only=True):
    """Each number is written by one thread, and read by any."""

    triggers: int = 0
    """Parts that were announced."""
    triggers_lost: int = 0
    """Triggers that could not be taken since too many parts waited."""
    missing: int = 0
    """Parts that never came, by the others' numbers."""
    duplicates: int = 0
    """Parts whose number or name had come before."""
    late: int = 0
    """Parts without a verdict at their deadline."""
    late_answers: int = 0
    """Answers of the model for parts that had been decided without it."""
