"""The cores that a process may use, by affinity and by quota."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeflame.cpus import usable_cpus

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")


def quota(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A machine whose files say so."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # at least one
        ("0::/\n", {"cpu.max": "390000 100000\n"}, 3),  # rounded down
        ("0::/line.slice/a.service\n", {"line.slice/a.service/cpu.max": "max 100000\n",
                                        "line.slice/cpu.max": "400000 100000\n"}, 4),
        ("0::/docker/1234\n", {"cpu.max": "300000 100000\n"}, 3),  # the container's own group is mounted at the top
        ("4:cpu,cpuacct:/\n0::/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                                     "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3),
        ("1:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 64),
        ("0::/\n", {"cpu.max": "junk\n"}, 64),
        ("", {}, 64),
    ],
)  # fmt: skip
def test_a_quota_of_cpu_time_is_seen(
    cgroup: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert usable_cpus(quota(tmp_path, cgroup, files)) == cores


def test_a_real_quota_is_seen() -> None:
    group = Path(f"/sys/fs/cgroup/cpu/edgeflame-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("120000")
    except OSError:
        pytest.skip("no control group can be made here")
    program = (
        f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid())); "
        "from edgeflame.cpus import are_cpus_limited, usable_cpus; print(usable_cpus(), are_cpus_limited())"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    finally:
        group.rmdir()
    assert done.stdout == f"1 {os.cpu_count() != 1}\n", done.stderr


@needs_affinity
def test_a_process_that_may_use_one_core_computes_with_one(package_file: Path) -> None:
    """Every count of threads that a line, training and the demo make."""
    program = f"""
import os
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
from pathlib import Path
from edge.inspector import InspectorLoader
from edgeflame import onnx_session
from edgeflame.cpus import usable_cpus
from edgeflame.package import read_package

assert usable_cpus() == 1
package = read_package(Path({str(package_file)!r}))
loader = InspectorLoader(device="cpu")
from edge.runtimes.load import open_runtime
assert loader._parallel(package, open_runtime(package.model_onnx, device="cpu")) == (1, None)
loader.share_cores(4)
assert loader._num_threads == 1
os.cpu_count = lambda: 8  # as in a container on a large machine
session = onnx_session.open_session(package.model_onnx, device="cpu", num_threads=None)
assert session.get_session_options().intra_op_num_threads == 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
