"""A fleet of real processes for tests: aggregator and sites, started, watched, killed and started again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.brokers import BrokerProcess
from tests.support.paths import REPOSITORY, TINY_TRAINER
from tests.support.waiting import wait_for

WORKER = shlex.join([sys.executable, str(TINY_TRAINER)])


class Process:
    """One command of ours; its standard output and log are files that grow over restarts."""

    def __init__(
        self, name: str, folder: Path, arguments: list[str], env: dict[str, str], *, program: list[str] | None = None
    ) -> None:
        self.name = name
        self._program = program
        self._arguments = arguments
        self._env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **env}
        self.out = folder / f"{name}.out"
        self.err = folder / f"{name}.err"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again; another program was meant for the first time only."""
        program, self._program = self._program or ["-m", "edgeflame"], None
        command = [sys.executable, *program, "-v", *self._arguments]
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self._process = subprocess.Popen(command, stdout=out, stderr=err, env=self._env)

    @property
    def log(self) -> str:
        return self.err.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def wait_for_log(self, text: str, *, times: int = 1) -> None:
        """Until a text was logged so many times; fails at once if the process ends before."""

        def seen() -> bool:
            if self.log.count(text) >= times:
                return True
            assert self.exit_code is None, f"{self.name} ended with {self.exit_code} before {text!r}:\n{self.log}"
            return False

        # A busy machine takes its time to start processes that import torch; one that fails is reported above.
        wait_for(seen, f"{self.name} logs {text!r}", timeout_s=100.0)

    def wait(self) -> int:
        """Until it ends by itself; its exit code."""
        wait_for(lambda: self.exit_code is not None, f"{self.name} ends")
        assert self.exit_code is not None
        return self.exit_code

    def interrupt(self, signum: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(signum)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


class Fleet:
    """An aggregator and sites on a broker; a context manager that leaves nothing running."""

    def __init__(
        self,
        broker: BrokerProcess,
        folder: Path,
        *,
        config: str = "",
        env: dict[str, str] | None = None,
        kits: Path | None = None,
        name: str = "test",
    ) -> None:
        self.broker = broker
        self.kits = kits
        self.name = name
        self.folder = folder
        self.env = env or {}
        (folder / "data").mkdir(exist_ok=True)
        self.config = folder / "fleet.toml"
        self.config.write_text(config)
        self.processes: list[Process] = []
        self.programs: dict[str, list[str]] = {}
        """What to start processes with for the first time, by their name, instead of ``-m edgeflame``."""

    def aggregator(self, *arguments: str, name: str = "aggregator") -> Process:
        common = ["aggregate", *self._contact("aggregator"), "--config", str(self.config)]
        return self._add(name, [*common, "--state", str(self.folder / name), *arguments], {})

    def site(self, site: str, *arguments: str, process: str = "", state: str = "", **env: str) -> Process:
        name = process or site
        common = ["train", *self._contact(site, "--site", site), "--worker", WORKER]
        paths = ["--data", str(self.folder / "data"), "--state", str(self.folder / (state or f"state-{name}"))]
        return self._add(name, [*common, *paths, "--out", str(self.folder / f"{name}.edgeflame"), *arguments], env)

    def ledger(self, name: str = "aggregator") -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "ledger.json").read_bytes()))

    def model(self) -> bytes:
        return (self.folder / "aggregator" / "global-model.safetensors").read_bytes()

    def site_state(self, site: str) -> Path:
        return self.folder / f"state-{site}"

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self.processes:
            if kind is not None:
                print(f"---- {process.name} (exit code {process.exit_code})\n{process.log[-6000:]}")
            process.kill()

    def _contact(self, name: str, *more: str) -> list[str]:
        if self.kits is not None:
            return ["--kit", str(self.kits / f"{name}.kit")]
        return ["--broker", self.broker.url, "--fleet", self.name, *more]

    def _add(self, name: str, arguments: list[str], env: dict[str, str]) -> Process:
        process = Process(name, self.folder, arguments, {**self.env, **env}, program=self.programs.get(name))
        self.processes.append(process)
        return process
