"""``edgeflame``, with a fault at one step of the protocol: a program of the tests, not of EdgeFlame.

    python fault_injector.py ROLE STEP ACTION [edgeflame's arguments...]

ROLE is ``aggregator`` or ``site``; a STEP is named as in ``protocol_steps.py``, ``#2`` after it means its second time;
ACTION is ``kill`` (SIGKILL to this process at that very point), ``hold:FOLDER`` (make FOLDER/held, and wait there for
FOLDER/go) or ``trace:FILE`` (write every step that is reached to FILE; STEP is ``-``).

The functions in which the steps lie are wrapped here, so that EdgeFlame itself has no trace of this.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROLE, STEP, ACTION = sys.argv[1:4]
NAME, _, NUMBER = STEP.partition("#")
TIMES = int(NUMBER or 1)

reached: Counter[str] = Counter()


def reach(step: str) -> None:
    """A step is reached."""
    reached[step] += 1
    kind, _, where = ACTION.partition(":")
    if kind == "trace":
        with Path(where).open("a") as stream:
            stream.write(f"{step}\n")
    elif step == NAME and reached[step] == TIMES:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        (Path(where) / "held").touch()
        while not (Path(where) / "go").exists():
            time.sleep(0.01)


def wrap(owner: Any, function: str, label: Callable[..., str | None]) -> None:
    """Steps before and after a function; ``label`` names them by its arguments, None for no step."""
    original = getattr(owner, function)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        name = label(*args, **kwargs)
        if name is None:
            return original(*args, **kwargs)
        reach(f"before {name}")
        result = original(*args, **kwargs)
        reach(f"after {name}")
        return result

    setattr(owner, function, wrapped)


def tag(message: Any) -> str:
    """The type of a message or event, with its purpose and round where it has them."""
    parts = [str(message.__struct_config__.tag), getattr(message, "purpose", None), getattr(message, "round", None)]
    if parts[0] == "heartbeat":
        parts[1:] = ["ready" if message.ready else "not-ready"]
    return "-".join(str(part) for part in parts if part is not None)


def wrap_store() -> None:
    """What both roles do with blobs."""
    from edgeflame.transfer import store

    wrap(store.IncomingBlob, "add_chunk", lambda *_, **__: "storing a chunk")
    wrap(store.IncomingBlob, "finish", lambda *_, **__: "completing a blob")
    wrap(store.BlobStore, "add", lambda *_, **__: "adding a blob")
    wrap(store.BlobStore, "prune", lambda *_, **__: "pruning blobs")


def wrap_aggregator() -> None:
    """The aggregator's steps."""
    from aggregator import run, service
    from aggregator.journal import Journal

    wrap(Journal, "append", lambda _, __, events: "journalling " + " ".join(tag(event) for event in events))
    wrap(service._AggregatorService, "_send", lambda _, __, message: f"telling {tag(message)}")
    wrap(service._AggregatorService, "_on_site_message", lambda _, __, message, ___: f"hearing {tag(message)}")
    wrap(service._AggregatorService, "_publish_state", lambda self: f"announcing {place(self._run.state)}")
    wrap(run, "aggregate_round", lambda state, entry, *_: f"making model {entry.number}")
    wrap(run, "pool_statistics", lambda *_, **__: "pooling")
    wrap(service, "write_results", lambda *_: "writing results")


def place(state: Any) -> str:
    """Where a run stands."""
    return state.phase if state.phase != "train" or state.latest_round is None else f"train-{state.latest_round.number}"


def wrap_site() -> None:
    """The site's steps."""
    from trainer.agent import aggregator_client, service, state, step_runner

    def announced(_: Any, run: Any) -> str:
        return f"hearing {run.phase}-{run.round}" if run.phase == "train" else f"hearing {run.phase}"

    wrap(aggregator_client.AggregatorClient, "send", lambda _, message: f"saying {tag(message)}")
    wrap(aggregator_client.AggregatorClient, "send_chunk", lambda *_: "sending a chunk")
    wrap(service._SiteService, "_on_announcement", announced)
    wrap(service._SiteService, "_on_down", lambda _, message, __: f"hearing {tag(message)}")
    wrap(step_runner.StepRunner, "start", lambda _, step, __: begun(step))
    wrap(step_runner.StepRunner, "on_task_done", lambda self, _: f"done {begun(self.step)}")
    for name in ("store_initial", "store_update", "store_statistics", "store_finished"):
        wrap(state.SiteState, name, lambda *_, name=name, **__: name)
    wrap(state, "write_record", lambda path, _: f"writing {path.name}")
    wrap(state, "canonicalise", lambda _, path: f"writing {path.name}")


def begun(step: Any) -> str | None:
    """A step of the site's plan."""
    name = step.wire_name
    return None if name == "wait" else "-".join(str(p) for p in (name, getattr(step, "round", None)) if p is not None)


def main() -> None:
    """Wrap, and be ``edgeflame``."""
    del sys.argv[1:4]
    wrap_store()
    if ROLE == "aggregator":
        wrap_aggregator()
    else:
        wrap_site()
    from cli import main as edgeflame

    edgeflame()


if __name__ == "__main__":
    main()
