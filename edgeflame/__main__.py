"""``python -m edgeflame`` is ``edgeflame``."""

from edgeflame.cli import main

main()
