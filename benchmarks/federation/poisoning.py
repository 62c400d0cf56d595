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
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
import torch

from aggregator.config import AggregateConfig
from aggregator.simulation.config import BoardsData, EngineConfig, Evaluation, Partition, SimulationConfig
from aggregator.simulation.engines import open_engine
from aggregator.simulation.figures import METRICS
from aggregator.simulation.run import simulate
from edgeflame.console import LOGGER_NAME, Progress, no_progress
from edgeflame.images import Preprocessing
from edgeflame.learning import Learning, Training
from trainer.agent.orders import Setup
from trainer.agent.resident import Residents, answer
from trainer.agent.work import FinishOutcome, FinishTask, TrainOutcome, TrainTask
from trainer.measure import Measurer
from trainer.work import TorchSiteWork

NUM_SITES, SIDE = 5, 96
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


Attack = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
ATTACKS: dict[str, Attack] = {"sign flip": sign_flip, "scaled": scaled, "noise": noise}


class Poisoner:
    """A site's work that spoils what it sends."""

    def __init__(self, work: TorchSiteWork, attack: Attack) -> None:
        self._work = work
        self._attack = attack

    def write_initial_model(self, out: Path) -> None:
        self._work.write_initial_model(out)

    def train(self, task: TrainTask, report: Progress) -> TrainOutcome:
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

    def finish(self, task: FinishTask, report: Progress) -> FinishOutcome:
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
        for attack in options.attack:
            for num_bad in options.bad if attack != "none" else [0]:
                figures = [measure(Path(name), rule, attack, num_bad, options.rounds) for rule in RULES]
                row = f"| {attack} | {num_bad} of {NUM_SITES} | " + " | ".join(figures) + " |"
                print(row, flush=True)
                if options.out:
                    with options.out.open("a") as stream:
                        stream.write(row + "\n")


def measure(root: Path, rule: str, attack: str, num_bad: int, rounds: int) -> str:
    """Image AUROC of the final model, and how many updates were refused if any were."""
    bad = {f"site-{number}" for number in range(num_bad)}
    config = SimulationConfig(
        data=BoardsData(train_parts=40, image_size=128, photos=1, test_good_parts=24, test_defective_parts=40),
        sites=NUM_SITES,
        partition=Partition(beta="even"),
        fleet=AggregateConfig(
            rounds=rounds,
            quorum=0.2,
            learning=Learning(
                method="flame", input=Preprocessing(height=SIDE, width=SIDE), training=Training(epochs=1, batch_size=8)
            ),
            **RULES[rule],
        ),
        evaluation=Evaluation(every=0, sites=False),
        engine=EngineConfig(threads=torch.get_num_threads()),
    )

    def build(setup: Setup) -> Any:
        work = TorchSiteWork(
            learning=setup.learning, data=Path(setup.data), site=setup.site, state=Path(setup.state), num_references=0
        )
        return Poisoner(work, ATTACKS[attack]) if setup.site in bad else work

    out = root / "run"
    shutil.rmtree(out, ignore_errors=True)
    data = root / "data"
    if data.exists():
        out.mkdir()
        (out / "data").symlink_to(data)
    handle = functools.partial(answer, residents=Residents(build), measure=Measurer().measure)
    with open_engine(config.engine, handle) as engine:
        result = simulate(config, out, engine, no_progress)
    if not data.exists():
        (out / "data").rename(data)
    if not result.succeeded:
        return "failed"
    figures = msgspec.json.decode((out / METRICS).read_bytes())["rounds"][-1]["figures"]
    refused = sum(len(entry["left_out"]) for entry in result.ledger["rounds"])
    return f"{100 * figures['image_AUROC']:.1f}" + (f" ({refused} refused)" if refused else "")


if __name__ == "__main__":
    main()
