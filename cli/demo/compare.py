"""One site's comparison, as a program of its own: the backbone untrained, and trained on this site's images alone.

The demo needs only the figures of these two, so they are measured as fitted, without a package or a graph.
``cli.demo.compare DATA LEARNING.toml`` prints a JSON document of both evaluations.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cli.output import print_json
from edgeflame.errors import EdgeFlameError
from edgeflame.log import configure_logging

CONDITION_METHODS = {"none": "none", "alone": "fade"}
"""Condition of the demo's table to method of ``edgeflame fit``."""


def compare_methods(data: Path, config: Path) -> dict[str, object]:
    """Fit and evaluate both; condition to report.

    Raises:
        EdgeFlameError: as ``edgeflame fit`` and ``edgeflame evaluate`` would.
    """
    import msgspec

    from edgeflame.config import load_config
    from edgeflame.dataset import open_dataset
    from edgeflame.images import ImageU8
    from edgeflame.methods import Learning
    from edgeflame.tensors import F32
    from fitting.crossfit import image_scores, score_maps
    from fitting.evaluation import evaluate
    from fitting.fit import FittedModel
    from trainer.exchange import TrainedModel
    from trainer.fit import fit

    learning = load_config(config, Learning)
    dataset = open_dataset(data)
    reports: dict[str, object] = {}
    for condition, method in CONDITION_METHODS.items():
        fitted = fit(dataset, msgspec.structs.replace(learning, method=method))

        def score(batch: ImageU8, fitted: FittedModel[TrainedModel] = fitted) -> tuple[F32, F32]:
            maps = score_maps(fitted.site.statistics, fitted.model.embedder.embed(batch), learning.scoring)
            return image_scores(maps), maps

        reports[condition] = evaluate(score, dataset, learning.input, threshold=fitted.site.threshold.value)
    return reports


def print_comparison() -> None:
    configure_logging(log_format="json", verbosity=0)
    try:
        print_json(compare_methods(Path(sys.argv[1]), Path(sys.argv[2])))
    except EdgeFlameError as exc:
        sys.stderr.write(f"edgeflame: {exc}\n")
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    print_comparison()
