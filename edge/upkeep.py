"""What watches over a daemon's cameras beside the verdicts: drift and self-tests, put together for one run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from edge.control import Control
from edge.drift.watcher import DriftModel, DriftWatcher
from edge.golden.report import Expected, GoldenReport, GoldenStatus
from edge.golden.tester import GoldenTester
from edge.inspector import Inspector
from edge.line import Line
from edge.plan import Plan
from edge.status import CameraStatus
from edge.view import ViewConfig
from edgeflame.errors import UsageError

DRIFT_FOLDER = "drift"
GOLDEN_FOLDER = "golden"


@contextlib.contextmanager
def open_upkeep(plan: Plan, lines: Sequence[Line], control: Control, state: Path | None) -> Iterator[None]:
    """Watch drift (with a state folder) and test golden parts until the block is left.

    Args:
        plan: of the cameras.
        lines: the cameras.
        control: is told of both, and hands on what is asked of them.
        state: the daemon's folder.

    Raises:
        ConfigError: golden parts are configured and not there.
    """
    drift: dict[str, DriftWatcher] = {}
    golden: dict[str, GoldenTester] = {}
    settings = {camera.name: camera.settings for camera in plan.cameras}
    with contextlib.ExitStack() as stack:
        for line in lines:
            config = settings[line.name]
            tester = GoldenTester(
                line,
                config.golden,
                folder=state / GOLDEN_FOLDER if state is not None else None,
                on_change=control.changed,
            )
            golden[line.name] = stack.enter_context(tester)
            if state is None or not config.drift.enabled:
                continue
            watcher = DriftWatcher(
                line.name,
                config.drift,
                line.judge.model_id,
                partial(_model_of, line, config.view),
                folder=state / DRIFT_FOLDER,
                on_change=control.changed,
            )
            drift[line.name] = stack.enter_context(watcher)
            line.watch(watcher)
            stack.callback(line.unwatch, watcher)

        def annotated(status: CameraStatus) -> CameraStatus:
            watcher, tester = drift.get(status.camera), golden[status.camera]
            problem = tester.problem()
            return msgspec.structs.replace(
                status,
                drift=watcher.status() if watcher is not None else None,
                golden=tester.status(),
                not_ready=(*status.not_ready, problem) if problem is not None else status.not_ready,
            )

        def test(camera: str, expected: Expected | None) -> GoldenReport:
            return golden[camera].test(expected)

        def acknowledge(camera: str) -> GoldenStatus:
            return golden[camera].acknowledge()

        def deal_with_drift(camera: str, action: Literal["clear", "relearn"]) -> CameraStatus:
            watcher = drift.get(camera)
            if watcher is None:
                msg = f"camera {camera}: drift is not watched ([drift] enabled, and --state DIR)"
                raise UsageError(msg)
            if action == "clear":
                watcher.clear()
            else:
                watcher.relearn()
            return next(status for status in control.statuses() if status.camera == camera)

        control.annotate(annotated)
        control.register("golden", test)
        control.register("acknowledge", acknowledge)
        control.register("drift", deal_with_drift)
        yield


def _model_of(line: Line, view: ViewConfig, model: str) -> DriftModel | None:
    """Of the model that a part was judged by; None if another judges by now."""
    judge = line.judge
    if not isinstance(judge, Inspector) or judge.model_id != model:
        return None
    judges_all = not (view.roi or view.ignore or view.ignore_image)
    return DriftModel.of(judge.package, scores_as_fitted=judges_all and judge.precision != "int8")
