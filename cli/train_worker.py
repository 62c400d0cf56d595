"""The process in which ``edgeflame train`` does its learning.

Not for people: it speaks JSON lines on standard input and output (``trainer.agent.tasks``).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeflame.errors import MissingDependencyError
from edgeflame.log import configure_logging
from edgeflame.package import DEFAULT_REFERENCES

if TYPE_CHECKING:
    from trainer.agent.tasks import SiteTrainer, WorkerSetup


REFERENCES_OPTION = "--reference-images"
"""Number of good images in the package; the rest of the set-up comes on standard input."""


DEVICE_OPTION = "--device"
"""The device to compute on."""


def build_trainer(setup: WorkerSetup, *, num_references: int, device: str) -> SiteTrainer:
    """The learning, in torch.

    Raises:
        UsageError: torch cannot use the device.
        MissingDependencyError: torch, or what else training needs, is not installed.
    """
    try:
        from export.network import scoring_graph
        from trainer.work import TorchSiteTrainer
    except ImportError as exc:
        raise MissingDependencyError(
            f"training needs more than is installed here ({exc}): pip install 'edgeflame[train,cpu]'"
        ) from exc
    return TorchSiteTrainer(
        learning=setup.learning,
        data=Path(setup.data),
        site=setup.site,
        groups_file=None if setup.groups_file is None else Path(setup.groups_file),
        marks=None if setup.marks is None else Path(setup.marks),
        product=setup.product,
        exporter=scoring_graph,
        num_references=num_references,
        device=device,
    )


def run_worker_process() -> None:
    """Do tasks until standard input ends. Arguments: the log format, reference images, the device, ``-v``."""
    arguments = sys.argv[1:]
    configure_logging(log_format="json" if "json" in arguments else "text", verbosity=sum(a == "-v" for a in arguments))
    from trainer.agent.worker import run_worker

    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    num_references = int(options.get(REFERENCES_OPTION, DEFAULT_REFERENCES))
    run_worker(partial(build_trainer, num_references=num_references, device=options.get(DEVICE_OPTION, "auto")))


if __name__ == "__main__":
    run_worker_process()
