"""Where things lie in the repository."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDED = REPOSITORY / "tests" / "upgrades" / "recorded"
"""What earlier versions said and left on the disk."""
TINY_TRAINER = REPOSITORY / "tests" / "support" / "tiny_trainer.py"
"""A program for ``train --worker`` that learns in a moment."""
