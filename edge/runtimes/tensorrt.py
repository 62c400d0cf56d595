"""Runs TensorRT engines: on RTX GPUs by ``tensorrt_rtx``, on Jetson and data-centre GPUs by ``tensorrt``.

All buffers are allocated once, for the engine's largest batch, pinned on the host; their addresses are bound once. A
frame costs a copy in, one execution and a copy out for each output, on one stream. tensorrt_rtx captures its kernels as
a CUDA graph by itself, which saves launching them one by one.

Written after NVIDIA's documentation and tested against a stand-in: it has not been run on a GPU.

:class:`Cuda` provides what it needs of CUDA: a stream, device memory, pinned host memory, and copies between them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.runtimes.interface import Scores, check_batch
from edgeflame.errors import MissingDependencyError, PackageError, RuntimeUnavailableError
from edgeflame.images import ImageU8
from edgeflame.package import Package
from edgeflame.scoring_graph import INPUT, MAP, SCORE, UNSMOOTHED
from edgeflame.tensorrt import EngineRecord, TensorRT, TensorRTKind, device_capability, find_engine, load_tensorrt

Bytes = npt.NDArray[np.uint8]

_PORTABLE = 1  # cudaHostAllocPortable


class Cuda:
    """One CUDA stream, and memory allocated on device and host; :meth:`close` frees them.

    Raises:
        MissingDependencyError: cuda-bindings are not installed.
        RuntimeUnavailableError: no GPU can be used, or it has no memory left.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._api = _import_runtime() if runtime is None else runtime
        self._host: list[int] = []
        self._device: list[int] = []
        self._stream = self._call("cudaStreamCreate")

    @property
    def stream_handle(self) -> int:
        return int(self._stream)

    def pinned(self, num_bytes: int) -> Bytes:
        """Host memory that is never paged out, ``[num_bytes]``; copies from and to it need no staging."""
        address = int(self._call("cudaHostAlloc", num_bytes, _PORTABLE))
        self._host.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def device(self, num_bytes: int) -> int:
        """Address of new device memory."""
        address = int(self._call("cudaMalloc", num_bytes))
        self._device.append(address)
        return address

    def copy_in(self, device: int, host: Bytes, num_bytes: int) -> None:
        """Enqueue a copy of the first bytes to the device."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host.ctypes.data, num_bytes, kind, self._stream)

    def copy_out(self, host: Bytes, device: int, num_bytes: int) -> None:
        """Enqueue a copy of the first bytes from the device."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, device, num_bytes, kind, self._stream)

    def wait(self) -> None:
        """Wait until everything enqueued is done."""
        self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free everything; arrays of :meth:`pinned` must not be used any more."""
        for address in self._device:
            self._api.cudaFree(address)
        for address in self._host:
            self._api.cudaFreeHost(address)
        self._device, self._host = [], []
        self._api.cudaStreamDestroy(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            code, *results = getattr(self._api, name)(*arguments)
        except RuntimeError as exc:
            # The bindings load the driver at the first call.
            raise RuntimeUnavailableError(
                f"CUDA cannot be used here ({str(exc).splitlines()[0]}); is the NVIDIA driver installed?"
            ) from exc
        if int(code) != 0:
            raise RuntimeUnavailableError(
                f"{name} failed: {getattr(code, 'name', code)}; is there a GPU, its driver, and free memory on it?"
            )
        return results[0] if results else None


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise MissingDependencyError(
            f"running an engine needs cuda-bindings ({exc}): pip install cuda-bindings"
        ) from exc
    return runtime


def open_engine_runtime(package: Package, folder: Path, kind: TensorRTKind) -> EngineRuntime:
    """Open the engine of a package for the GPU of this machine.

    Args:
        package: the package.
        folder: the engines that ``edgeflame export --trt`` has written.
        kind: TensorRT for RTX GPUs, or for Jetson and data-centre ones.

    Raises:
        MissingDependencyError: TensorRT or cuda-bindings are not installed.
        RuntimeUnavailableError: there is no GPU, or no engine for this GPU, runtime version and package.
        PackageError: the engine file is incomplete or altered, or not the engine of a scoring graph.
    """
    library = load_tensorrt(kind)
    record, data = find_engine(
        folder,
        package_sha256=package.sha256,
        runtime=library.module.__name__,
        runtime_version=library.version,
        compute_capability=device_capability(),
    )
    return EngineRuntime(library, data, record, Cuda())


class EngineRuntime:
    """Implements :class:`edge.runtimes.interface.Runtime` with an engine; larger batches than its own are split."""

    def __init__(self, library: TensorRT, data: bytes, record: EngineRecord, cuda: Cuda) -> None:
        trt = library.module
        self._record, self._cuda, self._library = record, cuda, library
        library.take_errors()
        # The runtime must outlive its engine, and the engine its context.
        self._runtime = trt.Runtime(library.logger)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            why = "; ".join(library.take_errors()) or "it does not say why"
            raise RuntimeUnavailableError(
                f"{record.file}: {trt.__name__} {library.version} refuses the engine ({why}); build it again"
            )
        self._input_size, self._grid, self._max_batch, maps = _read_signature(self._engine, record.file)
        self._context = _context(trt, self._engine)
        if self._context is None:
            why = "; ".join(library.take_errors()) or "it does not say why"
            raise RuntimeUnavailableError(f"{record.file}: the engine cannot run on this GPU ({why})")
        height, width = self._input_size
        map_bytes = 4 * self._grid[0] * self._grid[1]
        self._image_bytes, self._map_bytes = height * width * 3, map_bytes
        most = self._max_batch
        self._images_host = cuda.pinned(most * self._image_bytes)
        self._scores_host = cuda.pinned(most * 4)
        self._maps_host = {name: cuda.pinned(most * map_bytes) for name in maps}
        self._images = self._images_host.reshape(most, height, width, 3)
        self._scores = self._scores_host.view(np.float32)
        self._maps = {name: host.view(np.float32).reshape(most, *self._grid) for name, host in self._maps_host.items()}
        self._device = {
            INPUT: cuda.device(most * self._image_bytes),
            SCORE: cuda.device(most * 4),
            **{name: cuda.device(most * map_bytes) for name in maps},
        }
        for name, address in self._device.items():
            if not self._context.set_tensor_address(name, address):
                raise RuntimeUnavailableError(f"{record.file}: TensorRT takes no buffer for {name}")
        self._shaped_for = 0

    @property
    def provider(self) -> str:
        return f"{self._library.module.__name__} {self._library.version}"

    @property
    def precision(self) -> str:
        return self._record.precision

    @property
    def input_size(self) -> tuple[int, int]:
        return self._input_size

    @property
    def grid(self) -> tuple[int, int]:
        return self._grid

    def score(self, batch: ImageU8) -> Scores:
        check_batch(batch, self._input_size)
        parts = [self._run(batch[start : start + self._max_batch]) for start in range(0, len(batch), self._max_batch)]
        if len(parts) == 1:
            return parts[0]
        return Scores(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.maps for part in parts]),
            None
            if parts[0].unsmoothed is None
            else np.concatenate([part.unsmoothed for part in parts if part.unsmoothed is not None]),
        )

    def close(self) -> None:
        """Free the engine and all memory."""
        self._cuda.wait()
        del self._images, self._scores, self._maps, self._images_host, self._scores_host, self._maps_host
        del self._context, self._engine, self._runtime
        self._cuda.close()

    def _run(self, batch: ImageU8) -> Scores:
        count, cuda = len(batch), self._cuda
        if count != self._shaped_for:
            if not self._context.set_input_shape(INPUT, (count, *self._input_size, 3)):
                raise RuntimeUnavailableError(f"{self._record.file}: TensorRT takes no batch of {count}")
            self._shaped_for = count
        np.copyto(self._images[:count], batch)
        cuda.copy_in(self._device[INPUT], self._images_host, count * self._image_bytes)
        if not self._context.execute_async_v3(cuda.stream_handle):
            why = "; ".join(self._library.take_errors()) or "it does not say why"
            raise RuntimeUnavailableError(f"{self.provider} failed on a batch of {count} ({why})")
        cuda.copy_out(self._scores_host, self._device[SCORE], count * 4)
        for name, host in self._maps_host.items():
            cuda.copy_out(host, self._device[name], count * self._map_bytes)
        cuda.wait()
        maps = {name: values[:count].copy() for name, values in self._maps.items()}
        return Scores(self._scores[:count].copy(), maps[MAP], maps.get(UNSMOOTHED))


def _context(trt: Any, engine: Any) -> Any:
    if not hasattr(trt, "CudaGraphStrategy"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)


def _read_signature(engine: Any, file: str) -> tuple[tuple[int, int], tuple[int, int], int, tuple[str, ...]]:
    """Input size (height, width), grid (height, width), largest batch, and the names of the maps it gives.

    Raises:
        PackageError: it is not the engine of a scoring graph.
    """
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    # Engines that older versions built give the smoothed map alone.
    maps = (MAP, UNSMOOTHED) if UNSMOOTHED in names else (MAP,)
    if names != {INPUT, SCORE, *maps}:
        raise PackageError(f"{file}: not the engine of a scoring graph: its tensors are {', '.join(sorted(names))}")
    image, anomaly_map = tuple(engine.get_tensor_shape(INPUT)), tuple(engine.get_tensor_shape(MAP))
    same = all(tuple(engine.get_tensor_shape(name)) == anomaly_map for name in maps)
    if len(image) != 4 or image[3] != 3 or len(anomaly_map) != 3 or not same:
        raise PackageError(f"{file}: not the engine of a scoring graph: image {list(image)}, map {list(anomaly_map)}")
    largest = engine.get_tensor_profile_shape(INPUT, 0)[2]
    return (image[1], image[2]), (anomaly_map[1], anomaly_map[2]), int(largest[0]), maps
