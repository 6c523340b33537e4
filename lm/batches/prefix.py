"""Prefix language modelling: each document is split at random, its second part predicted.

Raffel et al. 2020, "Exploring the limits of transfer learning", section 3.2.
"""

import dataclasses

import numpy as np

from lm.batches.causal import CrossEntropy
from lm.data.packing import Row, uniforms
from lm.data.store import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(CrossEntropy):
    """Predict the tokens after a random place in a document from all before them.

    Attention is the model's, causal in the prefix, too.
    """


def rows(store: Store, seed: int, index: int, row: Row) -> Row:
    """Returns the row with `prefix` int32[T], 1 on the tokens that are given.

    Of n tokens of a document in the row 1 to n are given, each number as likely. The last
    given token predicts the first that is not: what is scored is never given.
    """
    real = row["segments"] > 0
    counts = np.bincount(row["segments"])  # tokens by segment, 0 of them padding
    drawn = uniforms(len(counts), "prefix", seed, index)
    given = 1 + np.floor(drawn * counts).astype(np.int64)
    last = given[row["segments"]] - 1  # position of the last given token
    weights = row["weights"] * (real & (row["positions"] >= last))
    scored = row["targets"][weights > 0]
    return {
        **row,
        "prefix": (real & (row["positions"] <= last)).astype(np.int32),
        "weights": weights,
        "bytes": store.token_bytes[scored].sum(dtype=np.int32),
    }
