"""One site alone, as a program of its own: fitted to this site's boards with the backbone as it is, and evaluated.

The demo needs only the figures, so they are measured as fitted, without a package or a graph.
``cli.demo.compare DATA LEARNING.toml`` prints what ``edgeflame evaluate --json`` would.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli.output import print_json
from edgeflame.errors import EdgeFlameError
from edgeflame.log import configure_logging

if TYPE_CHECKING:
    from fitting.evaluation import EvaluationReport


def evaluate_alone(data: Path, config: Path) -> EvaluationReport:
    """Fit and evaluate.

    Raises:
        EdgeFlameError: as ``edgeflame fit`` and ``edgeflame evaluate`` would.
    """
    from edgeflame.config import load_config
    from edgeflame.dataset import open_dataset
    from edgeflame.images import ImageU8
    from edgeflame.methods import Learning
    from edgeflame.tensors import F32
    from fitting.crossfit import image_scores, score_maps
    from fitting.evaluation import evaluate
    from trainer.fit import fit

    learning = load_config(config, Learning)
    dataset = open_dataset(data)
    fitted = fit(dataset, learning)

    def score(batch: ImageU8) -> tuple[F32, F32]:
        maps = score_maps(fitted.site.statistics, fitted.model.embedder.embed(batch), learning.scoring)
        return image_scores(maps), maps

    return evaluate(score, dataset, learning.input, threshold=fitted.site.threshold.value, num_resamples=0)


def print_evaluation() -> None:
    configure_logging(log_format="json", verbosity=0)
    try:
        print_json(evaluate_alone(Path(sys.argv[1]), Path(sys.argv[2])))
    except EdgeFlameError as exc:
        sys.stderr.write(f"edgeflame: {exc}\n")
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    print_evaluation()
