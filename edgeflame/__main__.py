"""``python -m edgeflame`` is ``edgeflame``."""

from __future__ import annotations

from cli import main

main()
