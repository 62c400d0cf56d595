"""Engines: which is taken, which refused, and how frames go through one. No GPU here: TensorRT and CUDA are stand-ins
whose memory is real and whose engine is the package's graph on the CPU, so that addresses and sizes must be right.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from edge.runtimes.interface import Runtime, Scores
from edge.runtimes.load import choose, open_for_line, open_runtime, require_parity
from edge.runtimes.tensorrt import Cuda, EngineRuntime
from edgeflame.errors import NegativeAnswerError, PackageError, RuntimeUnavailableError, UsageError
from edgeflame.package import Package, read_package
from edgeflame.scoring_graph import with_unsmoothed_map
from edgeflame.tensorrt import ENGINE_REPORT_FILE, BuildReport, EngineRecord, find_engine
from tests.support.small_package import GRID, SIZE, bad_image, good_image

IMAGES = np.stack([good_image(1), bad_image(2), good_image(3)])
MAX_BATCH = 2


class StandInCuda:
    """The calls of cuda.bindings.runtime on the host's own memory."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, room: int = 1 << 24) -> None:
        self.live: dict[int, Any] = {}
        self.room = room

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, 7

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if size > self.room:
            return 2, 0
        memory = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        return self.cudaMalloc(size)

    def cudaMemcpyAsync(self, to: int, source: int, count: int, kind: int, stream: int) -> tuple[int]:
        for address in (to, source):
            assert count <= len(self.live[address])
        ctypes.memmove(to, source, count)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.live[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)


class StandInTensorRT:
    """An engine that runs the graph it was given on the CPU, on the addresses it was given."""

    version, logger = "1.7", None

    def __init__(self, model_onnx: bytes, cuda: StandInCuda) -> None:
        self.session = onnxruntime.InferenceSession(model_onnx, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.cuda, self.addresses, self.count = cuda, {}, 0
        context = SimpleNamespace(
            set_tensor_address=lambda name, address: self.addresses.setdefault(name, address) is not None,
            set_input_shape=self._shape,
            execute_async_v3=self._execute,
        )
        shapes = {"image": (-1, SIZE, SIZE, 3), **dict.fromkeys(self.outputs, (-1, GRID, GRID)), "score": (-1,)}
        engine = SimpleNamespace(
            num_io_tensors=len(shapes),
            get_tensor_name=lambda index: list(shapes)[index],
            get_tensor_shape=shapes.__getitem__,
            get_tensor_profile_shape=lambda name, profile: [(1,), (1,), (MAX_BATCH, SIZE, SIZE, 3)],
            create_execution_context=lambda: context,
        )
        self.engine = engine
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine if data == b"engine" else None)
        self.module: Any = SimpleNamespace(__name__="tensorrt_rtx", Runtime=lambda logger: runtime)

    def take_errors(self) -> list[str]:
        return ["magic tag does not match"]

    def _shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.count = shape[0]
        return shape[0] <= MAX_BATCH

    def _execute(self, stream: int) -> bool:
        data = ctypes.string_at(self.addresses["image"], self.count * SIZE * SIZE * 3)
        image = np.frombuffer(data, np.uint8).reshape(self.count, SIZE, SIZE, 3)
        for name, result in zip(self.outputs, self.session.run(self.outputs, {"image": image}), strict=True):
            ctypes.memmove(self.addresses[name], result.tobytes(), result.nbytes)
        return stream == 7


def record(package: Package, **changes: Any) -> EngineRecord:
    plain = EngineRecord(
        file="one.engine",
        size_bytes=6,
        sha256=hashlib.sha256(b"engine").hexdigest(),
        build_s=1.0,
        compute_capability="8.9",
        precision="fp32",
        max_batch=MAX_BATCH,
        model_sha256="0" * 64,
        package_sha256=package.sha256,
        runtime="tensorrt_rtx",
        runtime_version="1.7",
    )
    return msgspec.structs.replace(plain, **changes)


def write_engines(folder: Path, *records: EngineRecord) -> None:
    (folder / "one.engine").write_bytes(b"engine")
    (folder / ENGINE_REPORT_FILE).write_bytes(msgspec.json.encode(BuildReport(engines=records)))


def find(folder: Path, package: Package, version: str = "1.7", capability: str = "8.9") -> bytes:
    return find_engine(
        folder,
        package_sha256=package.sha256,
        runtime="tensorrt_rtx",
        runtime_version=version,
        compute_capability=capability,
    )[1]


@pytest.fixture
def runtime(package: Package) -> EngineRuntime:
    cuda = StandInCuda()
    library: Any = StandInTensorRT(with_unsmoothed_map(package.model_onnx), cuda)
    return EngineRuntime(library, b"engine", record(package), Cuda(cuda))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_frames_go_through_in_one_set_of_buffers(runtime: EngineRuntime, package: Package, count: int) -> None:
    expected = open_runtime(package.model_onnx, device="cpu").score(IMAGES[:count])
    for _ in range(2):
        for got, wanted in zip(runtime.score(IMAGES[:count]), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert (runtime.input_size, runtime.grid, runtime.precision) == ((SIZE, SIZE), (GRID, GRID), "fp32")
    assert runtime.provider == "tensorrt_rtx 1.7"


def test_an_engine_that_an_older_version_built_gives_the_smoothed_map_alone(package: Package) -> None:
    cuda = StandInCuda()
    library: Any = StandInTensorRT(package.model_onnx, cuda)
    found = EngineRuntime(library, b"engine", record(package), Cuda(cuda)).score(IMAGES[:3])
    assert found.unsmoothed is None
    np.testing.assert_array_equal(found.scores_and_shown()[1], found.maps)


def test_it_allocates_once_and_gives_all_back(package: Package) -> None:
    cuda = StandInCuda()
    library: Any = StandInTensorRT(package.model_onnx, cuda)
    runtime = EngineRuntime(library, b"engine", record(package), Cuda(cuda))
    before = set(cuda.live)
    first = runtime.score(IMAGES[:1])
    second = runtime.score(IMAGES[1:2])
    assert set(cuda.live) == before
    assert first.scores[0] != second.scores[0]  # the answers are the caller's own
    runtime.close()
    assert cuda.live == {}


def test_an_engine_tensorrt_refuses_says_why(package: Package) -> None:
    cuda = StandInCuda()
    library: Any = StandInTensorRT(package.model_onnx, cuda)
    with pytest.raises(RuntimeUnavailableError, match=r"refuses the engine \(magic tag does not match\); build it"):
        EngineRuntime(library, b"engi", record(package), Cuda(cuda))


def test_an_engine_of_something_else_is_refused(package: Package) -> None:
    cuda = StandInCuda()
    library: Any = StandInTensorRT(package.model_onnx, cuda)
    library.engine.get_tensor_name = lambda index: ("image", "boxes", "labels")[index]
    with pytest.raises(PackageError, match="not the engine of a scoring graph: its tensors are boxes, image, labels"):
        EngineRuntime(library, b"engine", record(package), Cuda(cuda))


def test_no_memory_on_the_gpu_is_an_error(package: Package) -> None:
    cuda = StandInCuda(room=1000)
    library: Any = StandInTensorRT(package.model_onnx, cuda)
    with pytest.raises(RuntimeUnavailableError, match="cudaHostAlloc failed: 2"):
        EngineRuntime(library, b"engine", record(package), Cuda(cuda))


def test_where_there_is_no_gpu_cuda_says_so() -> None:
    bindings = pytest.importorskip("cuda.bindings.runtime")
    try:
        if int(bindings.cudaGetDeviceCount()[0]) == 0:
            pytest.skip("a GPU is here")
    except RuntimeError:
        pass
    with pytest.raises(RuntimeUnavailableError, match="driver"):
        Cuda()


def test_the_right_engine_is_found(package: Package, tmp_path: Path) -> None:
    write_engines(tmp_path, record(package), record(package, file="other", compute_capability="8.6"))
    assert find(tmp_path, package) == b"engine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_capability": "8.6"}, r"it has those for tensorrt_rtx 1\.7 and 8\.6\. Build it here"),
        ({"runtime_version": "1.6"}, r"it has those for tensorrt_rtx 1\.6 and 8\.9"),
        ({"package_sha256": "1" * 64}, r"its 1 engines are of other packages"),
    ],
)
def test_an_engine_for_another_device_version_or_package_is_refused(
    changes: dict[str, str], message: str, package: Package, tmp_path: Path
) -> None:
    write_engines(tmp_path, record(package, **changes))
    with pytest.raises(RuntimeUnavailableError, match=message):
        find(tmp_path, package)


def test_no_engines_at_all(package: Package, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"holds none at all.*edgeflame export --trt"):
        find(tmp_path, package)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"x", lambda data: None])
def test_an_engine_cut_short_altered_or_gone_is_refused(
    damage: Callable[[bytes], bytes | None], package: Package, tmp_path: Path
) -> None:
    write_engines(tmp_path, record(package))
    data = damage(b"engine")
    if data is None:
        (tmp_path / "one.engine").unlink()
    else:
        (tmp_path / "one.engine").write_bytes(data)
    with pytest.raises(PackageError, match="build it again"):
        find(tmp_path, package)


def test_a_report_cannot_point_outside_its_folder(package: Package, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"engine")
    write_engines(folder, record(package, file="../outside"))
    with pytest.raises(PackageError, match="cannot be read"):
        find(folder, package)


def test_an_engine_without_a_folder_is_a_wrong_command(package: Package) -> None:
    with pytest.raises(UsageError, match="--engines DIR"):
        open_for_line(package, device="rtx")


class Slow:
    """A runtime as it is, only later."""

    def __init__(self, inner: Runtime, factor: float = 1.0, repeats: int = 1) -> None:
        self.inner, self.factor, self.repeats = inner, factor, repeats
        self.provider, self.precision = inner.provider, inner.precision
        self.input_size, self.grid = inner.input_size, inner.grid

    def score(self, batch: np.ndarray) -> Scores:
        for _ in range(self.repeats):
            found = self.inner.score(batch)
        return Scores(found.scores * np.float32(self.factor), found.maps * np.float32(self.factor))


def test_auto_takes_the_fastest_that_scores_the_references_right(package: Package, tmp_path: Path) -> None:
    from tests.support.small_package import with_references

    package = read_package(with_references(package, tmp_path / "m.edgeflame"))
    cpu = open_runtime(package.model_onnx, device="cpu", num_threads=1)

    def unavailable() -> Runtime:
        raise RuntimeUnavailableError("no GPU")

    openers: dict[str, Callable[[], Runtime]] = {
        "slow": lambda: Slow(cpu, repeats=40),
        "fast": lambda: cpu,
        "wrong": lambda: Slow(cpu, factor=1.01),
        "gone": unavailable,
    }
    runtime, candidates = choose(package, openers)
    assert runtime is cpu
    assert [one.device for one in candidates] == ["fast", "slow", "wrong", "gone"]
    assert candidates[0].median_ms < candidates[1].median_ms  # type: ignore[operator]
    assert "a difference of 1.0" in str(candidates[2].refused)
    assert candidates[3].refused == "no GPU"
    with pytest.raises(NegativeAnswerError, match="does not score"):
        choose(package, {"wrong": openers["wrong"]})
    require_parity(runtime, package)


def test_auto_on_this_machine(package: Package) -> None:
    runtime, candidates = open_for_line(package, device="auto", num_threads=1)
    assert runtime.score(IMAGES[:1]).scores.shape == (1,)
    assert any(one.device == "cpu" for one in candidates)
