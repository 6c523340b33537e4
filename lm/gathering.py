"""Weights that are stored in shares and used whole for a step: gathered before, reduced after.

Under a pipeline with `pipeline.gather=step` the devices that share weights (fsdp) are replicas for
the length of a step, as data's are: each adds up a gradient of its own. R of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array

from lm import sharding, trees
from lm.nn import manual
from lm.program import Params, Program


def dtypes(prog: Program, path: str) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the dtypes in which a stored weight is gathered and then held whole.

    Those of compute; but routers decide in fp32, and the embedding and the head, which are cast
    where they are used, are held in fp32, for so do their gradients add up.
    """
    single = jnp.dtype(jnp.float32)
    if "choice" in prog.axes[path]:
        return single, single
    compute = prog.experiment.model.compute(prog.layout.platform)
    return compute, compute if prog.stacked(path) else single


def whole(prog: Program, params: Params) -> Params:
    """Returns what stages compute with: under `gather=step` all weights gathered, once."""
    if not prog.whole:
        return params

    def one(path: str, x: Array) -> Array:
        if prog.working[path] == prog.specs[path]:
            return x
        sent, held = dtypes(prog, path)
        return reshard(x.astype(sent), prog.working[path]).astype(held)  # all-gather

    flat = trees.flatten(params)
    return trees.nest({path: one(path, x) for path, x in flat.items()})


def total(prog: Program, grads: Params) -> Params:
    """Returns the sums of gradients [R, ...], each where its parameter is stored."""
    if not prog.whole:
        return jax.tree.map(lambda x: x.sum(0), grads)
    flat = trees.flatten(grads)
    return trees.nest({path: _total(prog, path, g) for path, g in flat.items()})


def _total(prog: Program, path: str, g: Array) -> Array:
    """A reduce-scatter over fsdp, then a sum over data."""
    stored, layout = prog.specs[path], sharding.current()
    replica, over = layout.axes("replica"), layout.axes("embed")
    split = [i for i, e in enumerate(stored) if sharding.names(e) == over]
    if not split:  # not stored in shares, or in those of other axes too
        return reshard(g.sum(0), stored)

    def scatter(g: Array) -> Any:
        return lax.psum_scatter(g, over, scatter_dimension=split[0] + 1, tiled=True)

    each = jax.typeof(g).sharding.spec
    out = P(replica[0] if replica else None, *stored)
    return manual.region(scatter, (each,), out)(g).sum(0)
