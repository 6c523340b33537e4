"""Stacked parameters: in memory rows in the order of stages, in checkpoints in that of layers.

The rows of a stage lie on its devices, in the order of its rounds, so that no step moves weights
between stages. Plain order is that of the layers, without the places that hold none; there the
stages' mesh axis splits the width of the weights instead, so that no device holds more than before.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array

from lm import sharding, trees
from lm.program import Program


def plain(prog: Program, tree: Any) -> Any:
    """Returns the tree (parameters, or a state with such in it) with its stacks in plain order."""
    if not prog.staged:
        return tree
    return _stacks(prog, tree, functools.partial(_plain, prog))


def arranged(prog: Program, tree: Any) -> Any:
    """Returns the tree with its stacks in the order of memory; the inverse of `plain`."""
    if not prog.staged:
        return tree
    return _stacks(prog, tree, functools.partial(_arranged, prog))


def moved(prog: Program, tree: Any) -> Any:
    """Does what `arranged` does, an array after the other: each is deleted when its new order is
    there, so that no more than one is held twice."""

    @functools.cache
    def compiled(name: str) -> Any:
        return prog.compiled(functools.partial(_arranged, prog, name))

    def one(name: str, x: Array) -> Array:
        new = jax.block_until_ready(compiled(name)(x))
        x.delete()
        return new

    return _stacks(prog, tree, one)


def _plain(prog: Program, name: str, x: Array) -> Array:
    rows = prog.rows(name).ravel()
    order = np.argsort(np.where(rows < 0, len(rows), rows))[: (rows >= 0).sum()]
    spec = _spread(prog, name, x)
    return reshard(x, spec).at[order].get(out_sharding=spec)


def _arranged(prog: Program, name: str, x: Array) -> Array:
    rows = prog.rows(name).ravel()
    spec = jax.typeof(x).sharding.spec
    x = x.at[np.maximum(rows, 0)].get(out_sharding=spec)
    there = (rows >= 0).reshape(-1, *[1] * (x.ndim - 1))
    return reshard(jnp.where(there, x, 0), _together(spec))


def rows(prog: Program, path: str, x_LE: Array) -> Array:
    """Returns of lines for all layers those of a stacked parameter's, in the order of memory; 0
    where there is no layer."""
    x_SE = x_LE[np.asarray(prog.layers(path))]
    if not prog.staged:
        return x_SE
    rows = prog.rows(path).ravel()
    return jnp.where((rows >= 0)[:, None], x_SE[np.maximum(rows, 0)], 0)


def _stacks(prog: Program, tree: Any, change: Any) -> Any:
    flat = trees.flatten(tree)
    for path, x in flat.items():
        if (name := _name(prog, path)) is not None:
            flat[path] = change(name, x)
    return trees.unflatten(flat, tree)


def _name(prog: Program, path: str) -> str | None:
    """Returns the stacked parameter whose value, or a statistic of it, lies at the path."""
    starts = (f"/{path}".find(f"/{name}/") for name in prog.stacks)
    found = (path[start:] for start in starts if start >= 0)
    return next((name for name in found if name in prog.axes), None)


def _stages() -> tuple[str, ...]:
    return sharding.current().axes("layers")


def _spread(prog: Program, path: str, x: Array) -> P:
    """Returns the spec of x in plain order: the stages' axis goes from the rows to the width."""
    stages, shape = _stages(), sharding.current().mesh.shape
    entries = [
        tuple(a for a in sharding.names(e) if a not in stages)
        for e in jax.typeof(x).sharding.spec
    ]
    axes = prog.axes[path]
    if "embed" in axes:
        i = axes.index("embed")
        over = entries[i] + stages
        if x.shape[i] % math.prod(shape[a] for a in over) == 0:
            entries[i] = over
    return P(*(e[0] if len(e) == 1 else e or None for e in entries))


def _together(spec: P) -> P:
    """The inverse of `_spread`."""
    stages = _stages()
    entries = [tuple(a for a in sharding.names(e) if a not in stages) for e in spec]
    entries[0] = stages + entries[0]
    return P(*(e[0] if len(e) == 1 else e or None for e in entries))
