"""A head that knows marked defects, in the scoring graph; see :mod:`edgeflame.statistics.head`.

Axes: N images, P positions, Q cells, C channels, H hidden units. The layer comes before the mean over a cell's
positions, which is the same and reads the embeddings but once.
"""

from __future__ import annotations

import numpy as np

from edgeflame.statistics.head import LIMIT, DefectHead
from export.builder import GraphBuilder


def add_head(g: GraphBuilder, embeddings: str, head: DefectHead) -> str:
    """The factors ``[N, 1, 1]`` of embeddings ``[P, N, C]``."""
    hidden = g.node("MatMul", embeddings, g.constant("head_weights", head.weights), result="head_positions")
    height, width = (side // head.pool for side in head.grid)
    num_hidden = len(head.out)
    if head.pool > 1:
        blocks = g.integers("head_blocks", height, head.pool, width, head.pool, -1)
        by_cell = g.node("Reshape", hidden, blocks, result="head_by_cell")
        hidden = g.node("ReduceMean", by_cell, g.integers("head_block_axes", 1, 3), result="head_means", keepdims=0)
        hidden = g.node(
            "Reshape", hidden, g.integers("head_cells", height * width, -1, num_hidden), result="head_pooled"
        )
    biased = g.node("Add", hidden, g.constant("head_bias", head.bias[:, None, :]), result="head_biased")
    active = g.node("Relu", biased, result="head_active")
    logits = g.node("MatMul", active, g.constant("head_out", head.out[:, None]), result="head_logits")  # [Q, N, 1]
    flat = g.node("Reshape", logits, g.integers("head_flat", height * width, -1), result="head_logits_flat")
    by_image = g.node("Transpose", flat, result="head_by_image", perm=[1, 0])
    largest = g.node(
        "TopK", by_image, g.integers("head_top", head.top), result="head_largest", others=("head_at",), axis=1
    )
    mean = g.node("ReduceMean", largest, g.integers("head_top_axis", 1), result="head_mean", keepdims=0)
    logs = g.node("Add", mean, g.constant("head_offset", np.array(head.offset, np.float32)), result="head_sum")
    low, high = (
        g.constant(name, np.array(value, np.float32)) for name, value in (("head_low", -LIMIT), ("head_high", LIMIT))
    )
    factor = g.node("Exp", g.node("Clip", logs, low, high, result="head_log"), result="head_factor")
    return g.node("Reshape", factor, g.integers("head_factor_shape", -1, 1, 1), result="head_factors")
