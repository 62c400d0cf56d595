"""From embeddings to distances, by the kind of statistics that a package scores with."""

from __future__ import annotations

import numpy as np

from edgeflame.console import EventLog
from edgeflame.memory_statistics import MemoryStatistics
from edgeflame.statistics_codec import PackageStatistics
from export import mahalanobis
from export.builder import GraphBuilder

log = EventLog("export")


def add_distances(g: GraphBuilder, embeddings: str, statistics: PackageStatistics) -> str:
    """Embeddings ``[P, N, C]`` to distances ``[P, N]``, in float32."""
    if isinstance(statistics, MemoryStatistics):
        return _add_memory(g, embeddings, statistics)
    log.debug(
        "distance_form",
        products=1 if mahalanobis.takes_one_product(statistics) else 2,
        error_bound_of_one=mahalanobis.single_product_error(statistics),
    )
    return mahalanobis.add_distances(g, embeddings, statistics)


def _add_memory(g: GraphBuilder, embeddings: str, statistics: MemoryStatistics) -> str:
    """With y = T (x - c) and the M prototypes q_m: distance^2 = | |y|^2 + min over m of (|q_m|^2 - 2 y'q_m) |.

    |y|^2 comes after the minimum, whose treatment of NaNs differs between runtimes: a NaN in y makes the sum NaN.
    """
    delta = g.node("Sub", embeddings, g.constant("centre", statistics.centre[None, None]), result="delta")
    own = g.node("MatMul", delta, g.constant("transform", statistics.transform.T), result="projected")  # [P, N, C]
    projected = statistics.projected()
    factors = g.constant("prototypes", (-2 * projected.T).astype(np.float32))
    norms = np.square(projected).sum(axis=1).astype(np.float32)
    products = g.node("MatMul", own, factors, result="products")  # [P, N, M]
    relative = g.node("Add", products, g.constant("prototype_norms", norms[None, None]), result="relative")
    last_axis = g.integers("memory_axis", 2)
    nearest = g.node("ReduceMin", relative, last_axis, result="nearest", keepdims=0)
    squares = g.node("ReduceSumSquare", own, last_axis, result="own_norm", keepdims=0)
    signed = g.node("Add", nearest, squares, result="squared_signed")
    return g.node("Sqrt", g.node("Abs", signed, result="squared"), result="distance_positions_first")
