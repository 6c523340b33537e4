"""Scores that depend on how far apart two tokens of a row are (Raffel et al. 2020, section 2.1).

Positions in a document count on by one, so the distance of two of its tokens is that of
their places in the row, whatever else is in it: one matrix serves all rows of a batch.

Shapes: N heads, n buckets, T queries, S keys, c chunks of t queries of which places count on by
one, M = t + S.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lm import sharding
from lm.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relative:
    """A learned score for each head and bucket of distances, shared by a stack's layers."""

    buckets: int = 32  # half of them of one distance each, then ever wider
    distance: int = 128  # tokens from which on all distances are in the last bucket

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 4:
            raise ConfigError(
                f"model.positions.buckets={self.buckets}: expected a multiple of 4, so that both "
                "directions have buckets of one distance and wider ones"
            )
        if self.distance <= self.buckets // 2:
            raise ConfigError(
                f"model.positions.distance={self.distance}: expected more than buckets / 2 = "
                f"{self.buckets // 2}, up to where each distance has a bucket of its own"
            )


def buckets(relative: Relative, *, causal: bool) -> np.ndarray:
    """Returns the bucket of each place of the key less that of the query, from -distance to
    distance; beyond these it is that of the last one.

    Causal, no key is later, and all buckets are of those before.
    """
    ahead = np.arange(-relative.distance, relative.distance + 1)
    count = relative.buckets if causal else relative.buckets // 2
    far = np.maximum(-ahead, 0) if causal else np.abs(ahead)
    exact = count // 2
    # In fp32, as everyone computes it: some distances lie on the edge of a bucket.
    ratio = np.maximum(far, 1).astype(np.float32) / np.float32(exact)
    wide = np.log(ratio) / np.float32(math.log(relative.distance / exact))
    wide = exact + (wide * np.float32(count - exact)).astype(np.int32)
    found = np.where(far < exact, far, np.minimum(wide, count - 1))
    return found if causal else found + np.where(ahead > 0, count, 0)


def scores(
    relative: Relative,
    table_Nn: Float[Array, "N n"],
    queries: int,
    keys: int,
    first: Array | int,
    *,
    causal: bool,
) -> Float[Array, "R N T S"]:
    """Returns what is added to the scores of a row, in fp32, once for each device of its own
    rows (R of them), so that the sum of its gradient over them is outside of any manual region.

    Where devices split the row, T and S are in the order of `sharding.order`; a device has its own
    queries and all keys.

    Args:
        relative: the buckets.
        table_Nn: the learned scores.
        queries: T, places first, first + 1, … of the row.
        keys: S, from its beginning.
        first: place of the first query; not 0 where earlier keys come from a cache.
        causal: whether queries see no later key.
    """
    T, S, shards = queries, keys, sharding.current().size("length")
    c = 1 if shards == 1 else 2 * shards
    t = T // c
    M = t + S
    place = jnp.arange(M)
    starts_c1 = jnp.asarray(sharding.order(T, shards)[::t, None]) + first
    ahead_cM = jnp.where(place < S, place, place - M)[None] - starts_c1
    edge = relative.distance
    of = jnp.asarray(buckets(relative, causal=causal))
    bucket_cM = of[jnp.clip(ahead_cM, -edge, edge) + edge]
    hot_cMn = jax.nn.one_hot(bucket_cM, relative.buckets, dtype=jnp.float32)
    by_NcM = jnp.einsum("nb,cmb->ncm", table_Nn.astype(jnp.float32), hot_cMn)
    # A row a query, each shifted by one against the one before: lines of M laid out as M - 1.
    R, N = sharding.current().size("batch"), len(table_Nn)
    over = sharding.spec("batch", "heads", "length", None, None)
    # Its transpose adds up a device's own rows first, then those of all: an all-reduce.
    lines = jax.lax.broadcast_in_dim(
        jax.sharding.reshard(by_NcM, sharding.spec("heads", "length", None)),
        (R, N, c, t, M), (1, 2, 4), out_sharding=over,
    )  # fmt: skip
    flat = sharding.spec("batch", "heads", "length", None)
    lines = lines.reshape(R, N, c, t * M, out_sharding=flat)[..., : t * (M - 1)]
    lines = lines.reshape(R, N, c, t, M - 1, out_sharding=over)
    chunks = np.split(sharding.order(S, shards), c)
    found = jnp.concatenate([lines[..., k[0] : k[-1] + 1] for k in chunks], -1)
    return found.reshape(R, N, T, S, out_sharding=flat)
