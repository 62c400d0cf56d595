"""What an engine needs of CUDA: a stream, memory on the device, pinned memory on the host, copies between them.

Written after NVIDIA's documentation of cuda-bindings and tested against a stand-in: it has not been run on a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeflame.errors import MissingDependencyError, RuntimeUnavailableError

Bytes = npt.NDArray[np.uint8]

_PORTABLE = 1  # cudaHostAllocPortable


class Cuda:
    """One stream, and the memory that was asked of it; freed by :meth:`close`.

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
        """Until all that was enqueued is done."""
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
            msg = f"CUDA cannot be used here ({str(exc).splitlines()[0]}); is the NVIDIA driver installed?"
            raise RuntimeUnavailableError(msg) from exc
        if int(code) != 0:
            msg = f"{name} failed: {getattr(code, 'name', code)}; is there a GPU, its driver, and free memory on it?"
            raise RuntimeUnavailableError(msg)
        return results[0] if results else None


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        msg = f"running an engine needs cuda-bindings ({exc}): pip install cuda-bindings"
        raise MissingDependencyError(msg) from exc
    return runtime
