"""From embeddings to distances in the scoring graph, by the kind of statistics that a package scores with.

Axes: N images, P positions, C channels, K rank, M prototypes.

**Gaussians.** The Mahalanobis distance of every position. With d = x - mu and t = U'd (U the stored basis, float16,
widened), s^2 the residual variance, l_i^2 the eigenvalues and D = diag(s^2 / l_i^2), the scaled squared distance is

    s^2 distance^2 = |d - U t|^2 + t' D t                                  (two products with U)
                   = |d|^2 - t' (2I - U'U - D) t = |d|^2 - |A'd|^2         (one product with A)

where A = U B and B B' = 2I - U'U - D. The second form reads half as much memory, which is what the distance costs: no
constant of the graph is larger. But it takes the difference of two numbers that may be close. Its relative error is at
most about ``ERROR_GROWTH`` * 2^-24 * max l^2 / s^2, since distance^2 is never below |d|^2 / max l^2; it is used where
that bound allows it, else the first form, a sum of squares. Neither clamps: what would be negative becomes NaN, a
fault and no perfect pass.

U is not exactly orthonormal, being rounded; that is why U'U stays in the formula. B is found from U'U = I + E by the
first order in E: B = S - X with S^2 = I - D and X_ij = E_ij / (S_i + S_j), which leaves an error of X^2, 1e-9. It is
computed from U whenever a runtime loads the model, and folded there, so that the file stays small.

**Memories.** The distance to the nearest prototype.
"""

from __future__ import annotations

import numpy as np
import onnx

from edgeflame.log import EventLog
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import LowRankGaussian
from edgeflame.statistics.memory import MemoryStatistics
from export.builder import GraphBuilder

ERROR_GROWTH = 8.0
"""Largest error of one product's distance, in units of 2^-24 * max l^2 / s^2. Measured for embeddings that lie along
the leading eigenvector, the worst there are: 6 to 8 at ratios from 100 to 15,000. Good images are at 0.2."""

MAX_ERROR = 5e-4
"""Allowed relative error of a distance: a tenth of the parity gate's tolerance for float32."""

MIN_GAP = 0.05
"""Least 1 - s^2 / l^2 for one product; an eigenvalue nearer to the residual variance makes X large."""


def single_product_error(statistics: LowRankGaussian) -> float:
    """Bound of the relative error of a distance by one product, in float32."""
    eigenvalues, residual = statistics.variances()
    ratio = (eigenvalues / residual[:, None]).max(initial=1.0)
    return float(ERROR_GROWTH * 2.0**-24 * ratio)


def takes_one_product(statistics: LowRankGaussian) -> bool:
    """Whether the form with one product is exact enough for these statistics."""
    if statistics.rank == 0:
        return False
    eigenvalues, residual = statistics.variances()
    gap = 1.0 - float((residual[:, None] / eigenvalues).max())
    return gap >= MIN_GAP and single_product_error(statistics) <= MAX_ERROR


def add_mahalanobis(g: GraphBuilder, embeddings: str, statistics: LowRankGaussian) -> str:
    """Distances ``[P, N]`` of embeddings ``[P, N, C]``."""
    _, residual = statistics.variances()
    delta = g.node("Sub", embeddings, g.constant("mean", statistics.mean[:, None, :]), result="delta")
    last_axis = g.integers("last_axis", 2)
    if statistics.rank == 0:
        squared = g.node("ReduceSumSquare", delta, last_axis, result="squared_scaled", keepdims=0)
    elif takes_one_product(statistics):
        squared = _one_product(g, delta, last_axis, statistics)
    else:
        squared = _two_products(g, delta, last_axis, statistics)
    normalised = g.node("Div", squared, g.constant("residual", residual[:, None]), result="squared")
    return g.node("Sqrt", normalised, result="distance_positions_first")


def _basis(g: GraphBuilder, statistics: LowRankGaussian) -> tuple[str, str]:
    """``[P, C, K]`` and ``[P, K, C]``."""
    stored = g.constant("basis_float16", statistics.basis.astype(np.float16))
    basis = g.node("Cast", stored, result="basis", to=onnx.TensorProto.FLOAT)
    return basis, g.node("Transpose", basis, result="basis_transposed", perm=[0, 2, 1])


def _one_product(g: GraphBuilder, delta: str, last_axis: str, statistics: LowRankGaussian) -> str:
    eigenvalues, residual = statistics.variances()
    roots = np.sqrt(1.0 - residual[:, None].astype(np.float64) / eigenvalues).astype(np.float32)  # S, [P, K]
    basis, back = _basis(g, statistics)
    identity = g.constant("identity", np.eye(statistics.rank, dtype=np.float32)[None])
    excess = g.node("Sub", g.node("MatMul", back, basis, result="gram"), identity, result="gram_excess")  # E
    by_column, by_row = g.constant("roots", roots[:, None, :]), g.constant("roots_by_row", roots[:, :, None])
    sums = g.node("Add", by_row, by_column, result="root_sums")
    correction = g.node("Div", excess, sums, result="root_correction")  # X
    root = g.node("Sub", g.node("Mul", identity, by_column, result="root_diagonal"), correction, result="root")  # B
    within = g.node("MatMul", delta, g.node("MatMul", basis, root, result="whitened_basis"), result="within")
    whole_squared = g.node("ReduceSumSquare", delta, last_axis, result="whole_squared", keepdims=0)
    within_squared = g.node("ReduceSumSquare", within, last_axis, result="within_squared", keepdims=0)
    return g.node("Sub", whole_squared, within_squared, result="squared_scaled")


def _two_products(g: GraphBuilder, delta: str, last_axis: str, statistics: LowRankGaussian) -> str:
    eigenvalues, residual = statistics.variances()
    basis, back = _basis(g, statistics)
    along = g.node("MatMul", delta, basis, result="along")  # [P, N, K]
    rest = g.node("Sub", delta, g.node("MatMul", along, back, result="within"), result="rest")
    rest_squared = g.node("ReduceSumSquare", rest, last_axis, result="rest_squared", keepdims=0)  # [P, N]
    relative = np.sqrt(residual[:, None].astype(np.float64) / eigenvalues).astype(np.float32)
    scaled = g.node("Mul", along, g.constant("along_scale", relative[:, None, :]), result="along_scaled")
    along_squared = g.node("ReduceSumSquare", scaled, last_axis, result="along_squared", keepdims=0)
    return g.node("Add", rest_squared, along_squared, result="squared_scaled")


log = EventLog("export")


def add_distances(g: GraphBuilder, embeddings: str, statistics: PackageStatistics) -> str:
    """Embeddings ``[P, N, C]`` to distances ``[P, N]``, in float32."""
    if isinstance(statistics, MemoryStatistics):
        return _add_memory_distances(g, embeddings, statistics)
    log.debug(
        "distance_form",
        products=1 if takes_one_product(statistics) else 2,
        error_bound_of_one=single_product_error(statistics),
    )
    return add_mahalanobis(g, embeddings, statistics)


def _add_memory_distances(g: GraphBuilder, embeddings: str, statistics: MemoryStatistics) -> str:
    """With y = T (x - c), the M prototypes q_m, their spreads s_m and b_m of the position, all as
    :mod:`edgeflame.statistics.memory` has them::

        distance^2 = | |y|^2 + min over m of ((1/s_m - 1) |y|^2 - 2 y' q_m / s_m + b_m) |

    |y|^2 comes after the minimum, whose treatment of NaNs differs between runtimes: a NaN in y makes the sum NaN.
    """
    delta = g.node("Sub", embeddings, g.constant("centre", statistics.centre[None, None]), result="delta")
    own = g.node("MatMul", delta, g.constant("transform", statistics.transform.T), result="projected")  # [P, N, C]
    last_axis = g.integers("memory_axis", 2)
    norms = g.node("ReduceSumSquare", own, last_axis, result="own_norm", keepdims=1)  # [P, N, 1]
    scales = statistics.scales()
    factors = -2 * statistics.projected().T * scales
    if statistics.spreads is not None:
        factors = np.vstack([factors, scales - 1])
        own = g.node("Concat", own, norms, result="projected_and_norm", axis=2)
    products = g.node(
        "MatMul", own, g.constant("prototypes", factors.astype(np.float32)), result="products"
    )  # [P, N, M]
    columns, rows = statistics.place_terms()
    if statistics.position_weight > 0:
        # [P, 1, M], computed from its factors when a runtime loads the model: the file stays small.
        at = g.constant("positions", columns[:, None].astype(np.float32))
        terms = g.node("MatMul", at, g.constant("place_factors", rows.astype(np.float32)), result="place_terms")
    else:
        terms = g.constant("prototype_norms", rows[:1, None].astype(np.float32))
    relative = g.node("Add", products, terms, result="relative")
    nearest = g.node("ReduceMin", relative, last_axis, result="nearest", keepdims=1)
    signed = g.node("Add", nearest, norms, result="squared_signed")
    squared = g.node("Abs", g.node("Squeeze", signed, last_axis, result="squared_flat"), result="squared")
    return g.node("Sqrt", squared, result="distance_positions_first")
