"""The layers of a pipeline's stages: one program for all, whatever kinds of layers a stage has.

Stages run in step (they are vmapped), so a place of a chunk has a row of parameters in every stack
of the model from which any chunk has a layer there, zeros where a stage has none. What blocks
have in common is computed once, on the row that the stage has; parts that differ (a dense
feed-forward on one stage, experts on another) are all computed, and each stage picks its own. So
kinds that alternate alike on every stage cost nothing more.

Shapes: P stages, v rounds, l places of a chunk, n of them in one stack; B batch, T length, D embed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lm.models import stack
from lm.nn.layers import Side

# Of a block; all that has parameters. Blocks of a model all have the same ones.
PARTS = (
    *("norm1", "mixer", "after1", "sum1"),
    *("norm3", "cross", "after3", "sum3"),
    *("norm2", "ffn", "after2", "sum2"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Which layer lies where."""

    layers: np.ndarray  # int [P, v, l]: the layer in each place, -1: none
    stacks: dict[str, list[int]]  # the layers of each stack by path: `stack.entries`

    @functools.cached_property
    def wanted(self) -> list[tuple[str, ...]]:
        """For each place the stacks of which any chunk has a layer there."""
        return [
            tuple(p for p, own in self.stacks.items() if np.isin(there, own).any())
            for there in np.moveaxis(self.layers, -1, 0)
        ]

    def rows(self, path: str) -> np.ndarray:
        """Returns int [P, v, n]: which of a stack's layers each row in memory is, -1: none."""
        here = [path in paths for paths in self.wanted]
        row = {layer: i for i, layer in enumerate(self.stacks[path])}
        own = self.layers[..., here]
        return np.array([row.get(i, -1) for i in own.flat]).reshape(own.shape)

    def computed(self, configs: Sequence[stack.Block.Config], part: str) -> list[Any]:
        """Returns what a stage computes of a part (`mixer`, `ffn`) for a chunk: its configs."""
        found = []
        for paths in self.wanted:
            found += {getattr(configs[self.stacks[p][0]], part) for p in paths}
        return found

    def share(
        self, configs: Sequence[stack.Block.Config], path: str, part: str
    ) -> float:
        """Returns 1 over how many stacks have one computation of a part, the mean of places."""
        if len(self.stacks) == 1:
            return 1.0
        shares = []
        for paths in self.wanted:
            kinds = {p: getattr(configs[self.stacks[p][0]], part) for p in paths}
            if path in kinds:
                shares.append(1 / [*kinds.values()].count(kinds[path]))
        return sum(shares) / len(shares)


def run(
    blocks: Any,
    places: Places,
    index_l: Array,
    x_BTD: Array,
    side: Side,
    *,
    remat: stack.Remat,
    scan: bool,
    first: int = 0,
) -> tuple[Array, dict[str, Array]]:
    """Returns x after the layers of one chunk, and the sum of their aux.

    Args:
        blocks: from `stack.build`, but of each stack the rows of this chunk, see `Places.rows`.
        places: of all chunks.
        index_l: int32 numbers of this chunk's layers; a negative one is no layer.
        x_BTD: the residual stream.
        side: what else every block gets.
        remat: what to keep for the backward.
        scan: over places of equal kinds.
        first: number of the stack's first layer, by which layers draw what they drop.
    """
    place = functools.partial(_place, places, side, first)
    place = stack.policy(remat, scan)(place)

    def unit(x: Array, slices: Any) -> tuple[Array, dict[str, Array]]:
        sums = []
        for i, here in enumerate(slices[0]):
            x, aux = place(x, here, slices[1][i])
            sums.append(aux)
        return x, stack.add(sums)

    first, sums = 0, []
    used = dict.fromkeys(places.stacks, 0)
    for repeats, kinds in stack.grouped(places.wanted):
        rows = _rows(blocks, kinds, repeats, used)
        after = first + repeats * len(kinds)
        slices = rows, index_l[first:after].reshape(repeats, len(kinds))
        first = after
        if scan:
            x_BTD, aux = jax.lax.scan(unit, x_BTD, slices)
            sums.append(jax.tree.map(lambda a: a.sum(0), aux))
            continue
        for one in stack.unstack(slices, repeats):
            x_BTD, aux = unit(x_BTD, one)
            sums.append(aux)
    return x_BTD, stack.add(sums)


def _rows(
    blocks: Any, kinds: Sequence[Sequence[str]], repeats: int, used: dict[str, int]
) -> list[dict[str, Any]]:
    """Returns for each place of a unit the rows, by stack, of its repeats; advances `used`."""
    found: list[dict[str, Any]] = [{} for _ in kinds]
    for path in dict.fromkeys(path for paths in kinds for path in paths):
        mine = [i for i, paths in enumerate(kinds) if path in paths]
        end, step = used[path] + repeats * len(mine), len(mine)
        for rank, i in enumerate(mine):
            some = slice(used[path] + rank, end, step)
            found[i][path] = jax.tree.map(lambda a, s=some: a[s], _at(blocks, path))
        used[path] = end
    return found


def _at(blocks: Any, path: str) -> Any:
    for name in path.split("/") if path else ():
        blocks = blocks[int(name)] if name.isdigit() else getattr(blocks, name)
    return blocks


def _place(
    places: Places,
    side: Side,
    first: int,
    x: Array,
    here: dict[str, Any],
    index: Array,
) -> tuple[Array, dict[str, Array]]:
    """One place: the block of the stack that has layer `index`, or nothing if that is negative."""
    x = checkpoint_name(x, "block")
    mine = [(index == jnp.asarray(places.stacks[path])).any() for path in here]
    block = _either(list(here.values()), mine)
    y, aux, _ = block(x, side, {"index": (first + index).astype(jnp.uint32)})
    there = index >= 0
    y = jnp.where(there, y, x)
    return y, jax.tree.map(lambda a: jnp.where(there, a, 0), aux)


def _either(blocks: list[Any], mine: list[Array]) -> Any:
    """Returns a block that does what the one does which is `mine`."""
    if len(blocks) == 1:
        return blocks[0]
    block = jax.tree.map(lambda a: a, blocks[0])  # a copy
    for name in PARTS:
        if getattr(block, name) is None:
            continue
        setattr(block, name, _part([getattr(b, name) for b in blocks], mine))
    return block


def _part(parts: list[Any], mine: list[Array]) -> Callable[..., Any]:
    """Returns the function of one part of a block: of equal ones (their weights apart) computed
    once, of others all. What is not picked has finite values, for its weights are zeros, and so
    a gradient of exactly zero."""
    kinds: dict[Any, tuple[Any, Array]] = {}
    for part, on in zip(parts, mine, strict=True):
        leaves, tree = jax.tree.flatten(part)
        kind = tree, tuple((a.shape, a.dtype) for a in leaves)
        if kind in kinds:
            other, before = kinds[kind]
            part = jax.tree.map(lambda a, b, on=on: jnp.where(on, a, b), part, other)
            on = on | before
        kinds[kind] = part, on

    def call(*args: Any) -> Any:
        outs = [part(*args) for part, _ in kinds.values()]
        if len(outs) == 1:
            return outs[0]
        ons = [on for _, on in kinds.values()]
        y, sums = None, []
        for out, on in zip(outs, ons, strict=True):
            # A norm returns an array; attention adds a cache (here None), a feed-forward its aux.
            here, aux = out if isinstance(out, tuple) else (out, None)
            y = here if y is None else jnp.where(on, here, y)
            sums.append({k: jnp.where(on, a, 0) for k, a in (aux or {}).items()})
        return (y, stack.add(sums)) if isinstance(outs[0], tuple) else y

    return call
