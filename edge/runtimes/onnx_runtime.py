"""A scoring graph in ONNX Runtime: the CPU everywhere, CUDA and TensorRT where its package was built for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge.runtimes.interface import Scores, check_batch
from edgeflame.errors import PackageError, RuntimeUnavailableError
from edgeflame.images import MAX_INPUT_SIDE, ImageU8
from edgeflame.onnx_session import Device, failures_of, first_line, import_library, open_session
from edgeflame.scoring_graph import INPUT, MAP, PRECISION_KEY, SCORE, UNSMOOTHED, with_unsmoothed_map


class OnnxRuntime:
    """A session of ONNX Runtime whose inputs and outputs are those of a scoring graph."""

    def __init__(self, session: Any, *, failures: tuple[type[Exception], ...]) -> None:
        self._session = session
        self._failures = failures
        self._input_size, self._grid = _read_signature(session)
        self._gives_unsmoothed = any(node.name == UNSMOOTHED for node in session.get_outputs())
        self._provider: str = session.get_providers()[0]
        self._idle: list[_Bound] = []
        self._precision: str = session.get_modelmeta().custom_metadata_map.get(PRECISION_KEY, "fp32")

    @property
    def provider(self) -> str:
        return self._provider

    @property
    def precision(self) -> str:
        return self._precision

    @property
    def input_size(self) -> tuple[int, int]:
        return self._input_size

    @property
    def grid(self) -> tuple[int, int]:
        return self._grid

    def score(self, batch: ImageU8) -> Scores:
        check_batch(batch, self._input_size)
        try:
            # Buffers are used by one thread at a time; there are as many as there were threads at once.
            bound = self._idle.pop()
        except IndexError:
            bound = self._bind(len(batch))
        if len(bound.image) != len(batch):
            bound = self._bind(len(batch))
        np.copyto(bound.image, batch)
        try:
            self._session.run_with_iobinding(bound.binding)
            bound.binding.synchronize_outputs()
        except self._failures as exc:
            raise RuntimeUnavailableError(
                f"ONNX Runtime failed on a batch of {len(batch)} ({first_line(exc)})"
            ) from exc
        unsmoothed = None if bound.unsmoothed is None else bound.unsmoothed.copy()
        scores = Scores(bound.scores.copy(), bound.maps.copy(), unsmoothed)
        self._idle.append(bound)
        return scores

    def _bind(self, count: int) -> _Bound:
        """Buffers for a batch size, bound in ONNX Runtime once; kept for the next batch of that size."""
        image = np.empty((count, *self._input_size, 3), dtype=np.uint8)
        # NaN until written: if a graph writes fewer values than declared, that shows as a fault.
        scores = np.full(count, np.nan, dtype=np.float32)
        maps = np.full((count, *self._grid), np.nan, dtype=np.float32)
        outputs = {SCORE: scores, MAP: maps}
        if self._gives_unsmoothed:
            outputs[UNSMOOTHED] = np.full_like(maps, np.nan)
        binding = self._session.io_binding()
        binding.bind_input(INPUT, "cpu", 0, image.dtype, image.shape, image.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return _Bound(binding, image, scores, maps, outputs.get(UNSMOOTHED))


class _Bound(NamedTuple):
    """Buffers, and the binding that holds their addresses."""

    binding: Any
    image: ImageU8
    scores: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]
    unsmoothed: npt.NDArray[np.float32] | None


def open_onnx_runtime(model_onnx: bytes, *, device: Device, num_threads: int | None) -> OnnxRuntime:
    """Load a scoring graph into ONNX Runtime; see :func:`edge.runtimes.load.open_runtime`."""
    session = open_session(with_unsmoothed_map(model_onnx), device=device, num_threads=num_threads)
    return OnnxRuntime(session, failures=failures_of(import_library()))


def _read_signature(session: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Input size and grid, if inputs and outputs are a scoring graph's.

    Raises:
        PackageError: they are not.
    """
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    found = ", ".join(f"{node.name} {node.type} {node.shape}" for node in (*inputs.values(), *outputs.values()))
    msg = (
        f"not a scoring graph: expected {INPUT} tensor(uint8) [N, H, W, 3], {SCORE} tensor(float) [N] and "
        f"{MAP} tensor(float) [N, h, w], got {found}"
    )
    unsmoothed = outputs.pop(UNSMOOTHED, None)
    if set(inputs) != {INPUT} or set(outputs) != {SCORE, MAP}:
        raise PackageError(msg)
    image, score, anomaly_map = inputs[INPUT], outputs[SCORE], outputs[MAP]
    types = (image.type, score.type, anomaly_map.type)
    if types != ("tensor(uint8)", "tensor(float)", "tensor(float)"):
        raise PackageError(msg)
    if len(image.shape) != 4 or image.shape[3] != 3 or len(score.shape) != 1 or len(anomaly_map.shape) != 3:
        raise PackageError(msg)
    if unsmoothed is not None and (unsmoothed.type, unsmoothed.shape[1:]) != (anomaly_map.type, anomaly_map.shape[1:]):
        raise PackageError(msg)
    sides = (*image.shape[1:3], *anomaly_map.shape[1:])
    if not all(isinstance(side, int) and 1 <= side <= MAX_INPUT_SIDE for side in sides):
        raise PackageError(msg)
    return (sides[0], sides[1]), (sides[2], sides[3])
