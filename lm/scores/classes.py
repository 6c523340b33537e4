"""Scores of classes, from one matrix of counts that adds up over batches, hosts and devices.

Shapes: B examples, C classes. Row t, column p of the matrix counts the examples of class t
that were taken for class p.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lm import sharding


def confusion(
    predicted_B: Int[Array, "B"],
    targets_B: Int[Array, "B"],
    weights_B: Float[Array, "B"],
    classes: int,
) -> Float[Array, "C C"]:
    """Returns the counts of a batch, whole on every device; weight 0 does not count.

    Exact up to 2^24 examples a batch; add those of batches up in integers.
    """
    true_BC = jax.nn.one_hot(targets_B, classes) * weights_B[:, None]
    found_BC = jax.nn.one_hot(predicted_B, classes)
    whole = sharding.spec(None, None)
    return jnp.einsum("bt,bp->tp", true_BC, found_BC, out_sharding=whole)  # all-reduce


def scores(counts_CC: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Returns accuracy, macro means, and precision, recall and F1 of each class by name.

    A class that was never predicted has precision 0, one without examples recall 0.
    """
    counts = np.asarray(counts_CC, np.float64)
    hits = counts.diagonal()
    precision = hits / np.maximum(counts.sum(0), 1)
    recall = hits / np.maximum(counts.sum(1), 1)
    f1 = 2 * hits / np.maximum(counts.sum(0) + counts.sum(1), 1)
    kinds = {"precision": precision, "recall": recall, "f1": f1}
    return {
        "accuracy": float(hits.sum() / max(counts.sum(), 1)),
        "examples": int(counts.sum()),
        **{f"macro_{kind}": float(values.mean()) for kind, values in kinds.items()},
        **{
            f"{kind}/{name}": float(value)
            for kind, values in kinds.items()
            for name, value in zip(names, values, strict=True)
        },
    }
