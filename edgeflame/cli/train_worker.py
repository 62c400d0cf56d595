"""``python -m edgeflame.cli.train_worker``: the process in which ``edgeflame train`` does its learning.

Not for people: it speaks JSON lines on standard input and output (``trainer.agent.orders``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeflame.console import configure_logging
from edgeflame.errors import MissingDependencyError

if TYPE_CHECKING:
    from trainer.agent.orders import Setup
    from trainer.agent.work import SiteWork


def build(setup: Setup) -> SiteWork:
    """The learning, in torch.

    Raises:
        MissingDependencyError: torch, or what else training needs, is not installed.
    """
    try:
        from export.graph import scoring_graph
        from trainer.work import TorchSiteWork
    except ImportError as exc:
        msg = f"training needs more than is installed here ({exc}): pip install 'edgeflame[train,cpu]'"
        raise MissingDependencyError(msg) from exc
    return TorchSiteWork(
        learning=setup.learning,
        data=Path(setup.data),
        site=setup.site,
        state=Path(setup.state),
        groups_file=None if setup.groups_file is None else Path(setup.groups_file),
        exporter=scoring_graph,
    )


def main() -> None:
    """Serve orders until standard input ends. Arguments: the log format, and ``-v`` for details."""
    arguments = sys.argv[1:]
    configure_logging(log_format="json" if "json" in arguments else "text", verbosity=sum(a == "-v" for a in arguments))
    from trainer.agent.worker import serve

    serve(build)


if __name__ == "__main__":
    main()
