"""Server rules against sites that poison the model: final image AUROC of FLAME on generated boards; Markdown.

Five simulated sites of equal size take part in the real rounds (`edgeflame simulate` without the command line). The bad
ones train as the others do, and then send something else:

* sign flip: the base model minus 50 times their change;
* scaled: the base model plus 500 times their change;
* noise: the base model plus noise, for each tensor as strong as its values.

The aggregator's checks are on; they refuse only a change that is longer than `max_relative_change`. The statistics of
the evaluation are fitted on good images of all sites, so what differs is the backbone alone.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boards_fleet
import numpy as np
import safetensors.numpy
import torch

from edgeflame.log import LOGGER_NAME, Progress
from trainer.agent.tasks import (
    FinishTask,
    InitialTask,
    SiteTrainer,
    StatisticsTask,
    TaskResult,
    TrainTask,
    WorkerSetup,
)

NUM_SITES = 5
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {"strategy": "fedavg"},
    "norm_clipping": {"strategy": "norm_clipping"},
    "trimmed_mean": {"strategy": "trimmed_mean", "trim": 0.4},
    "median": {"strategy": "median"},
}


def sign_flip(base: np.ndarray, update: np.ndarray, _generator: np.random.Generator) -> np.ndarray:
    return base - 50 * (update - base)


def scaled(base: np.ndarray, update: np.ndarray, _generator: np.random.Generator) -> np.ndarray:
    return base + 500 * (update - base)


def noise(base: np.ndarray, _update: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return base + generator.normal(size=base.shape) * base.std()


Model = dict[str, np.ndarray]
Attack = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
ATTACKS: dict[str, Attack] = {"sign flip": sign_flip, "scaled": scaled, "noise": noise}


class Poisoner:
    """A site's trainer whose updates are poisoned."""

    def __init__(self, work: SiteTrainer, attack: Attack) -> None:
        self._work = work
        self._attack = attack

    def write_initial_model(self, task: InitialTask) -> None:
        self._work.write_initial_model(task)

    def train(self, task: TrainTask, report: Progress) -> TaskResult:
        outcome = self._work.train(task, report)
        base, update = safetensors.numpy.load_file(task.base), safetensors.numpy.load_file(task.out)
        generator = np.random.default_rng(task.seed)
        for name, values in update.items():
            if values.dtype.kind == "f":
                bad = self._attack(base[name].astype(np.float64), values.astype(np.float64), generator)
                # A negative variance would be refused.
                update[name] = (np.abs(bad) if name.endswith("running_var") else bad).astype(values.dtype)
        safetensors.numpy.save_file(update, task.out)
        return outcome

    def compute_statistics(self, task: StatisticsTask, report: Progress) -> TaskResult:
        return self._work.compute_statistics(task, report)

    def finish(self, task: FinishTask, report: Progress) -> TaskResult:
        return self._work.finish(task, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attack", choices=["none", *ATTACKS], nargs="+", default=["none", *ATTACKS])
    parser.add_argument("--bad", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger(LOGGER_NAME).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        honest: dict[str, Model] = {}
        for attack in dict.fromkeys(["none", *options.attack]):
            for num_bad in options.bad if attack != "none" else [0]:
                figures = [measure(Path(name), rule, attack, num_bad, options.rounds, honest) for rule in RULES]
                row = f"| {attack} | {num_bad} of {NUM_SITES} | " + " | ".join(figures) + " |"
                print(row, flush=True)
                if options.out:
                    with options.out.open("a") as stream:
                        stream.write(row + "\n")


def measure(root: Path, rule: str, attack: str, num_bad: int, rounds: int, honest: dict[str, Model]) -> str:
    """Image AUROC of the final model, its distance to the honest model over what that changed, refusals if any.

    ``honest`` gets the models without bad sites, by rule: that run comes first.
    """
    bad = {f"site-{number}" for number in range(num_bad)}

    def build(setup: WorkerSetup) -> SiteTrainer:
        work = boards_fleet.work(setup)
        return Poisoner(work, ATTACKS[attack]) if setup.site in bad else work

    result, figures = boards_fleet.run(root, num_sites=NUM_SITES, rounds=rounds, build=build, **RULES[rule])
    if not result.succeeded:
        return "failed"
    assert result.model_path is not None
    model = safetensors.numpy.load_file(result.model_path)
    if num_bad == 0:
        honest[rule] = model
        initial = result.ledger["rounds"][0]["base_sha256"]
        honest["initial"] = safetensors.numpy.load_file(next((root / "run").glob(f"sites/*/blobs/{initial}")))
    moved = distance(model, honest[rule]) / distance(honest[rule], honest["initial"])
    refused = sum(len(entry["left_out"]) for entry in result.ledger["rounds"])
    return f"{100 * figures['image_AUROC']:.1f}, {moved:.2g}" + (f" ({refused} refused)" if refused else "")


def distance(one: Model, other: Model) -> float:
    """Euclidean distance of the float tensors."""
    names = [name for name, values in one.items() if values.dtype.kind == "f"]
    return float(np.sqrt(sum(np.square(one[name].astype(np.float64) - other[name]).sum() for name in names)))


if __name__ == "__main__":
    main()
